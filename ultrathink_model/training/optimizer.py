"""The optimizers: AdamW for all weights, or Muon for the matrices of the blocks with AdamW for the rest."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ultrathink_model.config.training import TrainingConfig
from ultrathink_model.distributed.state import same_mesh
from ultrathink_model.models.attention import Attention, FeedForward
from ultrathink_model.models.multimodal.encoder_block import EncoderAttention
from ultrathink_model.training.muon import Muon


def make_optimizer(training: TrainingConfig, module: nn.Module) -> Optimizer:
    """The optimizer that `training.optimizer` names, over a model that may be wrapped or sharded.

    Each group holds its `peak_lr`, which the schedule scales. Matrices decay; vectors do not.

    Args:
        training: Section `training` of the config.
        module: The model; weights that need no gradient are left out.
    """
    groups = _parameter_groups(training, module)
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optimizer == "adamw":
        return AdamW(groups, lr=training.learning_rate, betas=betas, eps=training.adam_eps, fused=True)
    return Muon(
        groups,
        momentum=training.muon_momentum,
        betas=betas,
        eps=training.adam_eps,
        parts=fused_matrices(module),
        # The iteration bears bfloat16, which has fp16's speed and no range to overflow.
        product_dtype=torch.bfloat16 if training.use_amp else None,
    )


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon moves a weight: a matrix, or a stack of expert matrices, inside a block, and not a router."""
    parts = name.split(".")
    return parameter.ndim >= 2 and "blocks" in parts and not any("router" in part for part in parts)


def fused_matrices(module: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """Rows of each matrix within the weights that hold several: queries, keys and values; gate and up."""
    parts: dict[Tensor, tuple[int, ...]] = {}
    for part in module.modules():
        if isinstance(part, Attention):
            key_rows = part.num_kv_heads * part.head_dim
            parts[part.qkv.weight] = (part.num_heads * part.head_dim, key_rows, key_rows)
        elif isinstance(part, FeedForward):
            half = part.gate_up.weight.shape[0] // 2
            parts[part.gate_up.weight] = (half, half)
        elif isinstance(part, EncoderAttention):
            width = part.qkv.weight.shape[1]
            parts[part.qkv.weight] = (width, width, width)
    return parts


def _parameter_groups(training: TrainingConfig, module: nn.Module) -> list[dict[str, Any]]:
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if training.optimizer == "muon" and is_block_matrix(name, parameter):
            muon.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    decay, rate = training.weight_decay, training.learning_rate
    return [
        *(_group(alike, "muon", training.muon_learning_rate, decay) for alike in same_mesh(muon)),
        *(_group(alike, "adamw", rate, decay) for alike in same_mesh(decayed)),
        *(_group(alike, "adamw", rate, 0.0) for alike in same_mesh(plain)),
    ]


def _group(parameters: list[nn.Parameter], rule: str, rate: float, decay: float) -> dict[str, Any]:
    return {"params": parameters, "rule": rule, "lr": rate, "peak_lr": rate, "weight_decay": decay}
