"""RMSNorm, and the sum that is normalised, in one pass over memory each way."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrathink_model.models.native.library import call, define, takes


def rms_norm(
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, " width"],
    eps: float,
    change: Float[Tensor, "*rows width"] | None = None,
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, "*rows width"]] | None:
    """`x + change`, and `norm(x + change)` over its last axis; None where they are not float32 on a processor.

    Without a change the first result is `x` itself.
    """
    if change is None:
        return (x, _RMSNorm.apply(x, weight, eps)) if takes(x, weight) else None
    if not takes(x, change, weight):
        return None
    total, normed = _RMSNormOfSum.apply(x, change, weight, eps)
    return total, normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return RMS_NORM(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_grad, weight_grad = RMS_NORM_GRAD(grad, None, *ctx.saved_tensors, ctx.eps)
        return x_grad, weight_grad, None


class _RMSNormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = RMS_NORM_OF_SUM(x, change, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, elsewhere: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total_grad, weight_grad = RMS_NORM_GRAD(grad, elsewhere, *ctx.saved_tensors, ctx.eps)
        return total_grad, total_grad, weight_grad, None


def _sizes(x: Tensor) -> list[int]:
    return [x.numel() // x.shape[-1], x.shape[-1]]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _like(x)
    call("rms_norm", [x.contiguous(), None, weight.contiguous(), None, out], _sizes(x), eps)
    return out


def _run_of_sum(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    results = _like(x), _like(x)
    call("rms_norm", [x.contiguous(), change.contiguous(), weight.contiguous(), *results], _sizes(x), eps)
    return results


def _run_grad(grad: Tensor, elsewhere: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    results = _like(x), _like(weight)
    given = [None if tensor is None else tensor.contiguous() for tensor in (grad, elsewhere, x, weight)]
    call("rms_norm_grad", [*given, *results], _sizes(x), eps)
    return results


RMS_NORM = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _run, lambda x, *_: _like(x))
RMS_NORM_OF_SUM = define(
    "rms_norm_of_sum(Tensor x, Tensor change, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run_of_sum,
    lambda x, *_: (_like(x), _like(x)),
)
RMS_NORM_GRAD = define(
    "rms_norm_grad(Tensor grad, Tensor? elsewhere, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run_grad,
    lambda grad, elsewhere, x, weight, eps: (_like(x), _like(weight)),
)
