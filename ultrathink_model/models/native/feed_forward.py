"""The gated feed-forward as one operator, whose threads take a block of rows from the first product to the last."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ultrathink_model.models.native.library import call, define, takes
from ultrathink_model.models.native.linear import FEWEST_ROWS
from ultrathink_model.models.recomputation import KEPT


def feed_forward(
    x: Float[Tensor, "*rows hidden"],
    gate_up: Float[Tensor, "double_width hidden"],
    down: Float[Tensor, "hidden width"],
) -> Float[Tensor, "*rows hidden"] | None:
    """`down(silu(gate(x)) · up(x))`; None where it is not float32 on a processor, or too little."""
    if not takes(x, gate_up, down) or x.numel() < FEWEST_ROWS * x.shape[-1]:
        return None
    out: Tensor = _FeedForward.apply(x, gate_up, down)
    return out


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        out, inner = FEED_FORWARD(x, gate_up, down)
        ctx.save_for_backward(x, gate_up, down, inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return FEED_FORWARD_GRAD(grad, *ctx.saved_tensors)


def _sizes(x: Tensor, down: Tensor) -> list[int]:
    return [x.numel() // x.shape[-1], *down.shape]


def _run(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the products of `gate_up` for the backward pass."""
    out, inner = _empty(x, gate_up, down)
    call("feed_forward", [x.contiguous(), gate_up.contiguous(), down.contiguous(), inner, out], _sizes(x, down))
    return out, inner


def _run_grad(grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
    results = _empty_grad(grad, x, gate_up, down, inner)
    given = [tensor.contiguous() for tensor in (grad, x, gate_up, down, inner)]
    call("feed_forward_grad", [*given, torch.empty_like(given[-1]), *results], _sizes(x, down))
    return results


def _empty(x: Tensor, gate_up: Tensor, _down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], gate_up.shape[0])


def _empty_grad(_grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, _inner: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, gate_up, down))


_OPERANDS = "Tensor x, Tensor gate_up, Tensor down"
FEED_FORWARD = define(f"feed_forward({_OPERANDS}) -> (Tensor, Tensor)", _run, _empty)
FEED_FORWARD_GRAD = define(
    f"feed_forward_grad(Tensor grad, {_OPERANDS}, Tensor inner) -> (Tensor, Tensor, Tensor)", _run_grad, _empty_grad
)
KEPT.append(FEED_FORWARD)


@register_flop_formula([FEED_FORWARD.overloadpacket])
def _operations(x: Any, gate_up: Any, down: Any, **_: Any) -> int:
    return 2 * torch.Size(x).numel() * (gate_up[0] + down[1])


@register_flop_formula([FEED_FORWARD_GRAD.overloadpacket])
def _grad_operations(_grad: Any, x: Any, gate_up: Any, down: Any, *_: Any, **__: Any) -> int:
    return 2 * 2 * torch.Size(x).numel() * (gate_up[0] + down[1])
