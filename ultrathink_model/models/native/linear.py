"""Linear layers whose weight's gradient needs no transposed copies, and whose threads take parts as they are free."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ultrathink_model.models.native.library import call, define, takes
from ultrathink_model.models.recomputation import KEPT

# Rows under which there are too few parts for the threads to share.
FEWEST_ROWS = 256


def linear(
    x: Float[Tensor, "*rows inner"], weight: Float[Tensor, "outer inner"]
) -> Float[Tensor, "*rows outer"] | None:
    """`x · weightᵀ`; None where it is not float32 on a processor, or too little."""
    if not takes(x, weight) or x.numel() < FEWEST_ROWS * x.shape[-1]:
        return None
    out: Tensor = _Linear.apply(x, weight)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return LINEAR(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else LINEAR_INPUT_GRAD(grad, weight),
            None if x is None else LINEAR_WEIGHT_GRAD(grad, x),
        )


def _sizes(x: Tensor, outer: int) -> list[int]:
    return [x.numel() // x.shape[-1], x.shape[-1], outer]


def _run(x: Tensor, weight: Tensor) -> Tensor:
    out = _empty(x, weight)
    call("linear", [x.contiguous(), weight.contiguous(), out], _sizes(x, weight.shape[0]))
    return out


def _run_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    x_grad = _empty_input_grad(grad, weight)
    call("linear_input_grad", [grad.contiguous(), weight.contiguous(), x_grad], _sizes(x_grad, weight.shape[0]))
    return x_grad


def _run_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    weight_grad = _empty_weight_grad(grad, x)
    call("linear_weight_grad", [grad.contiguous(), x.contiguous(), weight_grad], _sizes(x, grad.shape[-1]))
    return weight_grad


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _empty_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _empty_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[-1], x.shape[-1])


LINEAR = define("linear(Tensor x, Tensor weight) -> Tensor", _run, _empty)
LINEAR_INPUT_GRAD = define(
    "linear_input_grad(Tensor grad, Tensor weight) -> Tensor", _run_input_grad, _empty_input_grad
)
LINEAR_WEIGHT_GRAD = define("linear_weight_grad(Tensor grad, Tensor x) -> Tensor", _run_weight_grad, _empty_weight_grad)
KEPT.append(LINEAR)


@register_flop_formula([LINEAR.overloadpacket])
def _operations(x: Any, weight: Any, **_: Any) -> int:
    return 2 * torch.Size(x).numel() * weight[0]


@register_flop_formula([LINEAR_INPUT_GRAD.overloadpacket])
def _input_grad_operations(grad: Any, weight: Any, **_: Any) -> int:
    return 2 * torch.Size(grad).numel() * weight[1]


@register_flop_formula([LINEAR_WEIGHT_GRAD.overloadpacket])
def _weight_grad_operations(grad: Any, x: Any, **_: Any) -> int:
    return 2 * torch.Size(grad).numel() * x[-1]
