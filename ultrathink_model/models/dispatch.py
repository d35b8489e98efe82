"""Rows to experts and back: sorting by expert, grouped products, weighted sums, with gathers in both directions."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

# Rows of both operands must start at multiples of this for PyTorch's grouped kernels.
ALIGNMENT_BYTES = 16


class Dispatch(NamedTuple):
    """Where each token's copies lie once they are sorted by expert.

    Copies of no expert (dropped, or padding) stand behind the last expert's.
    """

    tokens: Int[Tensor, " copies"]  # token of each sorted copy
    slots: Int[Tensor, " copies"]  # flat index into (tokens, top_k) of each sorted copy
    places: Int[Tensor, "tokens top_k"]  # sorted place of each copy
    ends: Int[Tensor, " experts"]  # int32, one past the last copy of each expert

    @classmethod
    def sort(cls, experts: Int[Tensor, "tokens top_k"], num_experts: int) -> "Dispatch":
        """Sorts copies by expert, earlier tokens first; an id of `num_experts` means no expert."""
        ordered, slots = experts.flatten().sort(stable=True)
        places = torch.empty_like(slots)
        places[slots] = torch.arange(slots.shape[0], device=slots.device)
        every = torch.arange(num_experts, device=experts.device)
        ends = torch.searchsorted(ordered, every, right=True, out_int32=True)
        return cls(slots // experts.shape[1], slots, places.view_as(experts), ends)


def take_copies(x: Float[Tensor, "tokens hidden"], dispatch: Dispatch) -> Float[Tensor, "copies hidden"]:
    """Each token's row once for each of its copies, sorted by expert."""
    return _TakeCopies.apply(x, dispatch.tokens, dispatch.places)


def sum_copies(
    rows: Float[Tensor, "copies hidden"], weights: Float[Tensor, "tokens top_k"], dispatch: Dispatch
) -> Float[Tensor, "tokens hidden"]:
    """The weighted sum of each token's copies."""
    return _SumCopies.apply(rows, weights, dispatch.tokens, dispatch.slots, dispatch.places)


class _TakeCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return F.embedding_bag(places, grad, mode="sum"), None, None


class _SumCopies(torch.autograd.Function):
    """`embedding_bag` gathers and sums in one pass over memory; its own backward pass would scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, tokens: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, tokens, slots, places)
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, tokens, slots, places = ctx.saved_tensors
        grad_copies = grad.index_select(0, tokens)
        grad_weights = (rows * grad_copies).sum(dim=1)[places]
        return grad_copies * weights.flatten()[slots].unsqueeze(1), grad_weights, None, None, None


def grouped_linear(
    rows: Float[Tensor, "copies inner"], weight: Float[Tensor, "experts outer inner"], ends: Int[Tensor, " experts"]
) -> Float[Tensor, "copies outer"]:
    """`rows[i] · weight[e]ᵀ` with the expert e whose range of rows holds i.

    Rows behind the last expert's end are left undefined, and so is their gradient.
    """
    return _grouped_linear(rows, weight, ends)


@torch.library.custom_op("ultrathink::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _kernel_takes(rows, weight):
        return torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, (start, end) in enumerate(_ranges(ends)):
        torch.mm(rows[start:end], weight[expert].T, out=out[start:end])
    return out


@torch.library.custom_op("ultrathink::grouped_weight_grad", mutates_args=())
def _grouped_weight_grad(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the weights of `grouped_linear`: `grad[range]ᵀ · rows[range]` for each expert."""
    out = rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])
    if _kernel_takes(grad, rows):
        return torch._grouped_mm(grad.T, rows, offs=ends)
    for expert, (start, end) in enumerate(_ranges(ends)):
        torch.mm(grad[start:end].T, rows[start:end], out=out[expert])
    return out


@_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_weight_grad.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = _grouped_linear(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    grad_weight = _grouped_weight_grad(grad, rows, ends) if ctx.needs_input_grad[1] else None
    return grad_rows, grad_weight, None


_grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_save_operands)


@register_flop_formula([torch.ops.ultrathink.grouped_linear])
def _grouped_linear_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula([torch.ops.ultrathink.grouped_weight_grad])
def _grouped_weight_grad_flops(grad: Any, rows: Any, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * rows[1]


def _kernel_takes(*operands: Tensor) -> bool:
    """Whether PyTorch's grouped kernels take these operands: no float64, and rows aligned in memory."""
    return all(
        operand.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and operand.numel() > 0
        and operand.data_ptr() % ALIGNMENT_BYTES == 0
        and all(stride == 1 or stride * operand.element_size() % ALIGNMENT_BYTES == 0 for stride in operand.stride())
        for operand in operands
    )


def _ranges(ends: Tensor) -> list[tuple[int, int]]:
    last = ends.tolist()
    return list(zip([0, *last[:-1]], last, strict=True))
