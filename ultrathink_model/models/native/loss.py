"""The cross-entropy of a chunk of tokens with its gradients, from the last states on."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ultrathink_model.models.loss import IGNORED_LABEL
from ultrathink_model.models.native.library import call, define, takes


def chunk_losses(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " rows"],
    z_loss_weight: float,
    hidden_grad: Float[Tensor, "rows hidden"] | None,
    weight_grad: Float[Tensor, "vocab hidden"] | None,
) -> Float[Tensor, "2 rows"] | None:
    """Each row's loss, and the z-loss in it; as `loss.chunk_losses`. None where it is not float32 on a processor.

    Raises:
        IndexError: A label is no token of the vocabulary, and not -100.
    """
    if not takes(hidden, weight) or labels.dtype != torch.int64:
        return None
    return CROSS_ENTROPY(hidden, weight, labels, z_loss_weight, hidden_grad, weight_grad)


def _run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss_weight: float,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> Tensor:
    (rows, hidden_size), vocab = hidden.shape, weight.shape[0]
    unknown = ((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= vocab)
    if unknown.any():
        raise IndexError(f"label {int(labels[unknown][0])} is no token of a vocabulary of {vocab}")
    losses, logits = hidden.new_empty(2, rows), hidden.new_empty(rows, vocab)
    given = [hidden.contiguous(), weight.contiguous(), labels.contiguous(), logits, losses, hidden_grad, weight_grad]
    call("cross_entropy", given, [rows, hidden_size, vocab], z_loss_weight)
    return losses


CROSS_ENTROPY = define(
    "cross_entropy(Tensor hidden, Tensor weight, Tensor labels, float z_loss_weight, Tensor(a!)? hidden_grad, "
    "Tensor(b!)? weight_grad) -> Tensor",
    _run,
    lambda hidden, *_: hidden.new_empty(2, hidden.shape[0]),
)


@register_flop_formula([CROSS_ENTROPY.overloadpacket])
def _operations(hidden: Any, weight: Any, _labels: Any, _z: Any, hidden_grad: Any, weight_grad: Any, **_: Any) -> int:
    products = 1 + (hidden_grad is not None) + (weight_grad is not None)
    return products * 2 * torch.Size(hidden).numel() * weight[0]
