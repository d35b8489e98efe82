"""The memory that is reckoned: activations against what autograd keeps, state against what optimizers hold."""

import pytest
import torch

from ultrathink_model.config import load_config, make_config, override_config
from ultrathink_model.config.profiles import profile_path
from ultrathink_model.models import blocked_attention
from ultrathink_model.models.transformer import build_model
from ultrathink_model.planning import memory
from ultrathink_model.planning.memory import checkpoint_bytes, sharding, training_memory
from ultrathink_model.planning.parameters import count_parameters
from ultrathink_model.training.optimizer import make_optimizer

# Wide enough that what the formula leaves out, a few numbers a token, does not count.
WIDE = make_config(
    {
        "model": {
            "vocab_size": 512,
            "hidden_size": 256,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 704,
            "max_seq_length": 128,
        },
        "moe": {
            "num_knowledge_experts": 4,
            "num_skill_experts": 2,
            "num_meta_experts": 1,
            "num_safety_experts": 1,
            "layer_frequency": 2,
        },
        "training": {"batch_size": 4},
    }
)


def kept_bytes(config):
    """Bytes of all storages that autograd keeps of one micro-batch, beside the weights and the loss's own gradients."""
    model = build_model(config).train()
    model.begin_step(0)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other one takes its address
        return tensor

    tokens = torch.randint(0, config.model.vocab_size, (config.training.batch_size, config.model.max_seq_length))
    amp = torch.autocast("cpu", torch.bfloat16, enabled=config.training.use_amp)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), amp:
        output = model(tokens, labels=tokens)
    weight_grad = config.model.vocab_size * config.model.hidden_size * 4
    cast = sum(p.numel() for p in model.parameters() if p.ndim > 1) * 2 if config.training.use_amp else 0
    del output
    return sum(storage.nbytes() for storage in kept.values()) - weight_grad - cast


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.num_kv_heads=4", "model.intermediate_size=1024"],
        ["model.gradient_checkpointing=true"],
        ["training.use_amp=true"],
        ["advanced.enable_moe=true"],
        # Beyond the length of attention in blocks, and at it, where its weights weigh most.
        ["model.max_seq_length=768", "training.batch_size=1"],
        ["model.max_seq_length=512", "model.num_heads=8", "model.num_kv_heads=8", "training.batch_size=1"],
        ["model.max_seq_length=512", "model.use_flash_attention=false", "training.batch_size=1"],
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(overrides):
    config = override_config(WIDE, overrides)
    kept = training_memory(config, "single", 1).activations["whole" if config.model.gradient_checkpointing else "none"]
    assert kept == pytest.approx(kept_bytes(config), rel=0.05)


def test_attention_in_blocks_is_planned_as_it_is():
    assert (memory.BLOCK, memory.LONGEST) == (blocked_attention.BLOCK, blocked_attention.LONGEST)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("overrides", [[], ["advanced.enable_moe=true"]], ids=str)
def test_checkpoint_holds_weights_and_optimizer_state(optimizer, overrides):
    config = override_config(WIDE, [f"training.optimizer={optimizer}", *overrides])
    model = build_model(config)
    made = make_optimizer(config.training, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    state = [tensor for values in made.state.values() for tensor in values.values() if tensor.ndim]
    expected = sum(tensor.nbytes for tensor in [*model.parameters(), *state])
    assert checkpoint_bytes(config) == pytest.approx(expected, rel=0.01)


def test_strategies_cut_what_they_say():
    assert sharding("ddp", 2, 8).weights == 1
    assert sharding("fsdp", 2, 8).optimizer == 1 / 8
    assert sharding("deepspeed", 1, 8).gradients == 1
    assert sharding("deepspeed", 2, 8).gradients == 1 / 8
    assert sharding("deepspeed", 3, 8).weights == 1 / 8
    config = load_config(profile_path("medium"))
    totals = [training_memory(config, "fsdp", ranks).total for ranks in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)


def test_offloaded_state_is_in_host_memory():
    config = override_config(WIDE, ["distributed.enabled=true", "distributed.cpu_offload=true"])
    planned = training_memory(config, "deepspeed", 2)
    assert "optimizer" not in planned.parts
    assert planned.host == count_parameters(config).total * 8 / 2


def test_cut_matrices_leave_a_rank_its_share():
    base = ["distributed.enabled=true", "distributed.strategy=ddp"]
    whole = training_memory(override_config(WIDE, base), "ddp", 2)
    cut = training_memory(override_config(WIDE, [*base, "distributed.tensor_parallel_size=2"]), "ddp", 2)
    parts = count_parameters(WIDE).parts
    assert whole.parts["weights"] - cut.parts["weights"] == (parts["attention"] + parts["feed-forward"]) * 4 / 2
    assert cut.activations["none"] < whole.activations["none"]


def test_cut_experts_leave_a_rank_its_share():
    base = ["advanced.enable_moe=true", "distributed.enabled=true"]
    whole = training_memory(override_config(WIDE, base), "ddp", 2).parts["weights"]
    cut = override_config(WIDE, [*base, "distributed.expert_parallel_size=2"])
    assert whole - training_memory(cut, "ddp", 2).parts["weights"] == count_parameters(cut).experts * 4 / 2
