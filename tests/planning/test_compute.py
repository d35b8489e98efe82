"""The operations that are reckoned are those that PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.config import override_config
from ultrathink_model.models.transformer import build_model
from ultrathink_model.planning.compute import forward_flops_per_token, training_flops_per_token


def counted(config):
    """Operations per token of a forward pass, by the plain formula of attention, which computes the whole square."""
    model = build_model(config).eval()
    tokens = torch.randint(0, config.model.vocab_size, (2, config.model.max_seq_length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("overrides", [[], ["advanced.enable_moe=true"], ["model.num_kv_heads=4"]], ids=str)
def test_forward_pass_is_what_pytorch_counts(tiny_config, overrides):
    config = override_config(tiny_config, ["model.use_flash_attention=false", *overrides])
    model = config.model
    triangle = 4 * model.num_layers * model.num_heads * model.head_size * (model.max_seq_length - 1) / 2
    assert forward_flops_per_token(config) + triangle == pytest.approx(counted(config))


def test_a_forced_path_of_a_routed_block_costs_as_many_passes(tiny_config):
    config = override_config(
        tiny_config, ["advanced.enable_dre=true", "dre.layer_frequency=2", "dre.compute_budget=0.5"]
    )
    dense = forward_flops_per_token(tiny_config)
    head = 2 * tiny_config.model.hidden_size * tiny_config.model.vocab_size
    assert forward_flops_per_token(config) == pytest.approx(head + (dense - head) * 0.75)


def test_training_costs_three_passes_and_one_more_of_the_blocks_with_checkpointing(tiny_config):
    forward = forward_flops_per_token(tiny_config)
    head = 2 * tiny_config.model.hidden_size * tiny_config.model.vocab_size
    assert training_flops_per_token(tiny_config) == 3 * forward
    checkpointed = override_config(tiny_config, ["model.gradient_checkpointing=true"])
    assert training_flops_per_token(checkpointed) == 4 * forward - head


def test_a_window_shortens_what_attention_reads(tiny_config):
    model = tiny_config.model
    windowed = forward_flops_per_token(override_config(tiny_config, ["model.sliding_window=5"]))
    seen = [min(position + 1, 5) for position in range(model.max_seq_length)]
    fewer = (model.max_seq_length + 1) / 2 - sum(seen) / len(seen)
    per_token = 4 * model.num_layers * model.num_heads * model.head_size
    assert forward_flops_per_token(tiny_config) - windowed == pytest.approx(per_token * fewer)
