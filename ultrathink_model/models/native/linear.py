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
        x_grad, weight_grad = LINEAR_GRAD(grad, x, weight)
        return None if weight is None else x_grad, None if x is None else weight_grad


def _run(x: Tensor, weight: Tensor) -> Tensor:
    out = _empty(x, weight)
    outer, inner = weight.shape
    call("linear", [x.contiguous(), weight.contiguous(), out], [x.numel() // inner, inner, outer])
    return out


def _run_grad(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of x, made with the weight, and of the weight, made with x; an empty one where that is None."""
    x_grad, weight_grad = _empty_grad(grad, x, weight)
    given = [None if tensor is None else tensor.contiguous() for tensor in (grad, x, weight)]
    outer, inner = grad.shape[-1], (x_grad if x is None else x).shape[-1]
    call("linear_grad", [*given, x_grad, weight_grad], [grad.numel() // outer, inner, outer])
    return x_grad, weight_grad


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _empty_grad(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty(0 if weight is None else (*grad.shape[:-1], weight.shape[1])),
        grad.new_empty(0 if x is None else (grad.shape[-1], x.shape[-1])),
    )


LINEAR = define("linear(Tensor x, Tensor weight) -> Tensor", _run, _empty)
LINEAR_GRAD = define("linear_grad(Tensor grad, Tensor? x, Tensor? weight) -> (Tensor, Tensor)", _run_grad, _empty_grad)
KEPT.append(LINEAR)


@register_flop_formula([LINEAR.overloadpacket])
def _operations(x: Any, weight: Any, **_: Any) -> int:
    return 2 * torch.Size(x).numel() * weight[0]


@register_flop_formula([LINEAR_GRAD.overloadpacket])
def _grad_operations(grad: Any, x: Any, weight: Any, **_: Any) -> int:
    operations = 2 * torch.Size(grad).numel()
    return operations * ((0 if weight is None else weight[1]) + (0 if x is None else x[-1]))
