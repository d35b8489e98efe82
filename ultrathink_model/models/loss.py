"""Next-token cross-entropy that never holds the logits of more than a chunk of tokens."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ultrathink_model.models.precision import autocast_dtype

IGNORED_LABEL = -100
# As `chunk_losses`; None where it cannot take them.
ChunkLosses = Callable[[Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None], Tensor | None]


def chunked_cross_entropy(
    hidden: Float[Tensor, "batch seq hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "batch seq"],
    chunk_size: int,
    z_loss_weight: float = 0.0,
    native: ChunkLosses | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum of `-log softmax(hidden · weightᵀ)[label]` over the labels, and the z-loss.

    The gradients of both inputs are made in the forward pass, chunk by chunk, so that the logits are computed once
    and dropped: memory does not grow with tokens × vocabulary (the idea of Hsu et al. 2024, arXiv 2410.10989).
    The z-loss is `z_loss_weight · Σ log²Z` (PaLM, arXiv 2204.02311). Its gradient travels with the first result:
    the objective is the sum of the two.

    Args:
        hidden: States after the final norm.
        weight: Output projection.
        labels: Target of each position; -100 is left out.
        chunk_size: Tokens whose logits are held at once.
        z_loss_weight: Weight of the squared log-partition; 0 leaves it out.
        native: What is asked first for the losses of a chunk.

    Returns:
        The cross-entropy in nats and the weighted z-loss, both summed over tokens, in float32.
    """
    total, z_loss = _ChunkedCrossEntropy.apply(
        hidden.flatten(0, 1), weight, labels.flatten(), chunk_size, z_loss_weight, native
    )
    z_loss = z_loss.detach()
    return total - z_loss, z_loss


def chunk_losses(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " rows"],
    z_loss_weight: float,
    hidden_grad: Float[Tensor, "rows hidden"] | None,
    weight_grad: Float[Tensor, "vocab hidden"] | None,
) -> Float[Tensor, "2 rows"]:
    """Each row's cross-entropy with its z-loss, and its z-loss; zero where there is no label.

    Args:
        hidden: States in the format of the products.
        weight: Output projection in the same.
        labels: Target of each row; -100 is left out.
        z_loss_weight: Weight of the squared log-partition.
        hidden_grad: Where the gradient of the first result's sum goes; None if it is not wanted.
        weight_grad: What the weight's gradient is added to, in float32 at least; None if it is not wanted.
    """
    kept = labels != IGNORED_LABEL
    targets = labels.clamp_min(0).unsqueeze(1)
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))  # (rows, vocab)
    chosen = logits.gather(1, targets).squeeze(1)
    largest = logits.amax(dim=1, keepdim=True)
    masses = logits.sub_(largest).exp_()
    partition = masses.sum(dim=1, keepdim=True)
    log_partition = (largest + partition.log()).squeeze(1)
    z_loss = z_loss_weight * log_partition.square() * kept
    losses = torch.stack(((log_partition - chosen) * kept + z_loss, z_loss))
    if hidden_grad is None and weight_grad is None:
        return losses
    scale = kept * (1 + 2 * z_loss_weight * log_partition)
    logits_grad = masses.mul_(scale.unsqueeze(1) / partition)
    logits_grad = logits_grad.scatter_add_(1, targets, -kept.to(masses.dtype).unsqueeze(1)).to(hidden.dtype)
    if hidden_grad is not None:
        hidden_grad.copy_(logits_grad @ weight)
    if weight_grad is not None and weight_grad.dtype == hidden.dtype:
        torch.addmm(weight_grad, logits_grad.T, hidden, out=weight_grad)
    elif weight_grad is not None:
        weight_grad += logits_grad.T @ hidden
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_size: int,
        z_loss_weight: float,
        native: ChunkLosses | None,
    ) -> tuple[Tensor, Tensor]:
        product_dtype = autocast_dtype(hidden)
        projection = weight.to(product_dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulator, device=hidden.device)
        z_loss = torch.zeros_like(total)
        hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        weight_grad = torch.zeros(weight.shape, dtype=accumulator, device=weight.device) if need_weight else None
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            operands = (
                hidden[rows].to(product_dtype),
                projection,
                labels[rows],
                z_loss_weight,
                None if hidden_grad is None else hidden_grad[rows],
                weight_grad,
            )
            losses = None if native is None else native(*operands)
            if losses is None:
                losses = chunk_losses(*operands)
            total += losses[0].sum()
            z_loss += losses[1].sum()
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(z_loss)
        return total, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_z_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad_total.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * grad_total.to(weight_grad.dtype),
            None,
            None,
            None,
            None,
        )
