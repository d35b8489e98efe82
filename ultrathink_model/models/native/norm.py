"""RMSNorm in one pass over memory each way."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrathink_model.models.native.library import call, define, takes


def rms_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*rows width"] | None:
    """`x / sqrt(mean(x²) + eps) · weight` over the last axis; None where it is not float32 on a processor."""
    if not takes(x, weight):
        return None
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return RMS_NORM(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_grad, weight_grad = RMS_NORM_GRAD(grad, *ctx.saved_tensors, ctx.eps)
        return x_grad, weight_grad, None


def _sizes(x: Tensor) -> list[int]:
    return [x.numel() // x.shape[-1], x.shape[-1]]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _like(x)
    call("rms_norm", [x.contiguous(), weight.contiguous(), out], _sizes(x), eps)
    return out


def _run_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    results = _like(x), _like(weight)
    call("rms_norm_grad", [grad.contiguous(), x.contiguous(), weight.contiguous(), *results], _sizes(x), eps)
    return results


RMS_NORM = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _run, lambda x, *_: _like(x))
RMS_NORM_GRAD = define(
    "rms_norm_grad(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run_grad,
    lambda grad, x, weight, eps: (_like(x), _like(weight)),
)
