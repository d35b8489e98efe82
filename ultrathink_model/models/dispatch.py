"""Rows to experts and back: sorting by expert, grouped products and sums, with gathers in both directions."""

import re
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ultrathink_model.models.mkl import mkl_grouped_outer_product, mkl_grouped_product, mkl_is_faster

# Rows of both operands must start at multiples of this for PyTorch's grouped kernels.
ALIGNMENT_BYTES = 16
# Namespace of the operators below: one a copy of this module, since each folder of an exported model holds one.
NAMESPACE = re.sub(r"\W", "_", __name__)


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
    return _TakeRows.apply(x, dispatch.tokens, dispatch.places)


def take_weights(weights: Float[Tensor, "tokens top_k"], dispatch: Dispatch) -> Float[Tensor, "copies 1"]:
    """The weight of each copy, sorted by expert."""
    return _TakeRows.apply(weights.reshape(-1, 1), dispatch.slots, dispatch.places.view(-1, 1))


def sum_copies(rows: Float[Tensor, "copies hidden"], dispatch: Dispatch) -> Float[Tensor, "tokens hidden"]:
    """The sum of each token's copies."""
    return _SumRows.apply(rows, dispatch.tokens, dispatch.places)


class _TakeRows(torch.autograd.Function):
    """Row `source[i]` as row i; `places` holds for each row of the input where it went.

    With both known, each direction is a gather: nothing is scattered, and no row waits for another.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return F.embedding_bag(places, grad, mode="sum"), None, None


class _SumRows(torch.autograd.Function):
    """The transpose of `_TakeRows`. `embedding_bag` gathers and sums in one pass over memory."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return F.embedding_bag(places, rows, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return grad.index_select(0, source), None, None


def grouped_linear(
    rows: Float[Tensor, "copies inner"], weight: Float[Tensor, "experts outer inner"], ends: Int[Tensor, " experts"]
) -> Float[Tensor, "copies outer"]:
    """`rows[i] · weight[e]ᵀ` with the expert e whose range of rows holds i.

    Rows behind the last expert's end are left undefined, and so is their gradient.
    """
    return _grouped_linear(rows, weight, ends)


@torch.library.custom_op(f"{NAMESPACE}::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if mkl_is_faster(rows, weight, ends):
        return mkl_grouped_product(rows, weight, ends)
    if _kernel_takes(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, (start, end) in enumerate(_ranges(ends)):
        torch.mm(rows[start:end], weight[expert].T, out=out[start:end])
    return out


@torch.library.custom_op(f"{NAMESPACE}::grouped_weight_grad", mutates_args=())
def _grouped_weight_grad(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the weights of `grouped_linear`: `grad[range]ᵀ · rows[range]` for each expert."""
    if mkl_is_faster(grad, rows, ends):
        return mkl_grouped_outer_product(grad, rows, ends)
    if _kernel_takes(grad, rows):
        return F.grouped_mm(grad.T, rows, offs=ends)
    out = rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])
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


@register_flop_formula([getattr(torch.ops, NAMESPACE).grouped_linear])
def _grouped_linear_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula([getattr(torch.ops, NAMESPACE).grouped_weight_grad])
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
