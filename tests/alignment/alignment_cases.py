"""What the tests of alignment share: a tiny config, and a model of it that has learnt a little."""

import torch

from ultrathink_model.config import Config
from ultrathink_model.data import DataManifest, TrainLoader
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.models.transformer import Transformer, build_model

VALUES = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_seq_length": 32,
    },
    "moe": {"num_knowledge_experts": 4, "num_skill_experts": 2, "num_meta_experts": 1, "num_safety_experts": 1},
    "training": {"batch_size": 4},
    "data": {"dataset": "dummy", "tokenizer_name": "train"},
    "evaluation": {"num_generations": 2},
    "logging": {"use_mlflow": False, "log_steps": 1},
    "rlhf": {
        "num_pairs": 24,
        "holdout_fraction": 0.25,
        "prompt_tokens": 6,
        "response_tokens": 5,
        "reward_epochs": 2,
        "reward_learning_rate": 3e-3,
        "reward_batch_size": 6,
        "rlhf_iterations": 4,
        "rlhf_frequency": 2,
        "ppo_epochs": 2,
        "ppo_batch_size": 16,
        "ppo_minibatch_size": 8,
        "group_size": 4,
        "policy_learning_rate": 1e-3,
    },
}
ROUTED = ["advanced.enable_moe=true", "advanced.enable_dre=true"]
ALONE = RankContext(0, 0, 1, torch.device("cpu"))


def trained(config: Config, manifest: DataManifest, steps: int) -> Transformer:
    """A model after some steps of pretraining, in evaluation mode."""
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, (batch, *_) in zip(range(steps), TrainLoader(manifest, config), strict=False):
        model.begin_step(step)
        output = model(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids)
        (sum(output.aux_losses.values(), output.loss_sum) / batch.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.end_step(lambda tensor: tensor)
    return model.eval()
