"""What the backward pass computes again instead of keeping it: whole blocks, or all but their products."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ultrathink_model.config import Config
from ultrathink_model.models.dispatch import NAMESPACE as DISPATCH

aten = torch.ops.aten

# Matrix products and attention, whose results cost the most to compute for the memory that they take.
KEPT = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    getattr(torch.ops, DISPATCH).grouped_linear.default,
]


def run_block(config: Config, block: Callable[..., Any], *arguments: Any) -> Any:
    """A block's output, with what `gradient_checkpointing_mode` says left to the backward pass.

    Args:
        config: Section `model` says how.
        block: What is called; it must do the same when it is called again.
        arguments: Its arguments.
    """
    if config.model.gradient_checkpointing_mode == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, KEPT)
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)
    return checkpoint(block, *arguments, use_reentrant=False)
