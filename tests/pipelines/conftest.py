"""A small workspace that the pipelines of a test module share."""

import json
import os
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

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
    "moe": {
        "num_knowledge_experts": 4,
        "num_skill_experts": 2,
        "num_meta_experts": 1,
        "num_safety_experts": 1,
        "layer_frequency": 2,
    },
    "training": {"batch_size": 4, "warmup_steps": 2, "learning_rate": 3e-3, "checkpoint_steps": 2},
    "rlhf": {
        "num_pairs": 16,
        "prompt_tokens": 8,
        "response_tokens": 8,
        "reward_epochs": 1,
        "reward_batch_size": 8,
        "rlhf_iterations": 2,
        "ppo_epochs": 1,
        "ppo_batch_size": 8,
        "ppo_minibatch_size": 4,
    },
    "data": {"dataset": "corpus.jsonl", "tokenizer_name": "train", "train_samples": 24},
    "evaluation": {"num_generations": 1, "generation_tokens": 8, "eval_samples": 8},
    "logging": {"log_steps": 1, "system_metrics": False},
    "output": {"output_dir": "./outputs/small"},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The working directory, with a config `small.yaml` and a corpus of 60 short documents."""
    from zenml.utils import source_utils

    folder = tmp_path_factory.mktemp("workspace")
    before = Path.cwd()
    os.chdir(folder)
    lines = [f"Chapter {n}: on the {n}th day the old ship sailed {n * n} miles to the east." for n in range(60)]
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    Path("small.yaml").write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    source_utils.set_custom_source_root(str(ROOT))
    yield folder
    source_utils.set_custom_source_root(None)
    os.chdir(before)
