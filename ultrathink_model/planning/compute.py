"""The work of a model, in floating-point operations per token."""

import math

from ultrathink_model.config import Config
from ultrathink_model.planning.parameters import expert_width, num_routed

# The backward pass computes two products for each of the forward pass.
TRAINING_PASSES = 3


def forward_flops_per_token(config: Config) -> float:
    """Matrix products of one forward pass, over the tokens of a full sequence: two operations a multiply-add.

    Attention is counted as the causal triangle, half of what a kernel that computes the whole square does. Blocks
    that are routed in depth count `dre.compute_budget` times, as after their warm-up.
    """
    model = config.model
    passes = config.dre.compute_budget if config.advanced.enable_dre else 1.0
    work = [_block_flops(config, layer) for layer in range(model.num_layers)]
    if num_routed(config):
        work = [flops * (passes if config.dre.routes(layer) else 1.0) for layer, flops in enumerate(work)]
    return sum(work) + 2 * model.hidden_size * model.vocab_size


def training_flops_per_token(config: Config) -> float:
    """Forward and backward pass of a training step, and what gradient checkpointing of whole blocks computes again."""
    forward = forward_flops_per_token(config)
    again = forward - 2 * config.model.hidden_size * config.model.vocab_size
    recomputes = config.model.gradient_checkpointing and config.model.gradient_checkpointing_mode == "whole"
    return TRAINING_PASSES * forward + (again if recomputes else 0.0)


def _block_flops(config: Config, layer: int) -> float:
    model, moe = config.model, config.moe
    hidden = model.hidden_size
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    seen = (model.max_seq_length + 1) / 2
    if model.sliding_window is not None and model.sliding_window < model.max_seq_length:
        seen = _mean_seen(model.max_seq_length, model.sliding_window)
    products = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden + 4 * queries * seen
    if config.advanced.enable_moe and (layer + 1) % moe.layer_frequency == 0:
        return products + 2 * hidden * moe.num_experts + 6 * hidden * expert_width(config) * moe.moe_top_k
    return products + 6 * hidden * model.feed_forward_size


def _mean_seen(length: int, window: int) -> float:
    """Tokens that a token of a sequence may look at, itself included, in the mean."""
    return (math.comb(window + 1, 2) + (length - window) * window) / length
