"""Experts whose whole feed-forward is one operator.

The operators of `dispatch` write every copy of every token to memory between one and the next. Here a thread takes an
expert from the gathering of its rows to the second product, while its cache holds them.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ultrathink_model.models.dispatch import Dispatch
from ultrathink_model.models.native.library import call, define, num_threads, takes
from ultrathink_model.models.recomputation import KEPT


def mix_experts(
    rows: Float[Tensor, "tokens hidden"],
    weights: Float[Tensor, "tokens top_k"],
    dispatch: Dispatch,
    gate_up: Float[Tensor, "experts double_width hidden"],
    down: Float[Tensor, "experts hidden width"],
) -> Float[Tensor, "tokens hidden"] | None:
    """Each token's sum of `weight · down_e(silu(gate_e(x)) · up_e(x))` over its copies; None where that is not for us.

    Only float32 is, on a processor, with an expert at least for each thread.
    """
    if not takes(rows, weights, gate_up, down) or gate_up.shape[0] < num_threads():
        return None
    mixed: Tensor = _Experts.apply(rows, weights, dispatch.slots, dispatch.places, dispatch.ends, gate_up, down)
    return mixed


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> Tensor:
        mixed, inner = EXPERTS(*operands)
        ctx.save_for_backward(*operands, inner)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows_grad, weights_grad, gate_up_grad, down_grad = EXPERTS_GRAD(grad, *ctx.saved_tensors)
        return rows_grad, weights_grad, None, None, None, gate_up_grad, down_grad


def _sizes(weights: Tensor, down: Tensor) -> list[int]:
    return [*weights.shape, *down.shape]


def _run(*operands: Tensor) -> tuple[Tensor, Tensor]:
    """The mixed rows, and the products of `gate_up` for the backward pass."""
    rows, weights, slots, _, _, _, down = operands
    mixed, inner = _empty(*operands)
    out = rows.new_empty(slots.shape[0], rows.shape[1])
    given = [tensor.contiguous() for tensor in operands]
    call("experts", [*given, inner, out, mixed], _sizes(weights, down))
    return mixed, inner


def _run_grad(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The gradients of rows, weights, gate_up and down."""
    _, rows, weights, slots, _, _, _, down, _ = tensors
    copies_grad = rows.new_empty(slots.shape[0], rows.shape[1])
    results = _empty_grad(*tensors)
    given = [tensor.contiguous() for tensor in tensors]
    call("experts_grad", [*given, copies_grad, *results], _sizes(weights, down))
    return results


def _empty(*operands: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, slots, _, _, gate_up, _ = operands
    return rows.new_empty(rows.shape), rows.new_empty(slots.shape[0], gate_up.shape[1])


def _empty_grad(*tensors: Tensor) -> tuple[Tensor, ...]:
    _, rows, weights, _, _, _, gate_up, down, _ = tensors
    return tuple(tensor.new_empty(tensor.shape) for tensor in (rows, weights, gate_up, down))


_OPERANDS = "Tensor rows, Tensor weights, Tensor slots, Tensor places, Tensor ends, Tensor gate_up, Tensor down"
EXPERTS = define(f"experts({_OPERANDS}) -> (Tensor, Tensor)", _run, _empty)
EXPERTS_GRAD = define(
    f"experts_grad(Tensor grad, {_OPERANDS}, Tensor inner) -> (Tensor, Tensor, Tensor, Tensor)", _run_grad, _empty_grad
)
# Selective recomputation keeps products.
KEPT.append(EXPERTS)


@register_flop_formula([EXPERTS.overloadpacket])
def _operations(rows: Any, weights: Any, slots: Any, places: Any, ends: Any, gate_up: Any, down: Any, **_: Any) -> int:
    return 2 * slots[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula([EXPERTS_GRAD.overloadpacket])
def _grad_operations(*shapes: Any, **_: Any) -> int:
    slots, gate_up, down = shapes[3], shapes[6], shapes[7]
    return 2 * 2 * slots[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])
