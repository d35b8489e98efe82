"""Root-mean-square normalisation with a fast gradient on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x²) + eps) · weight` over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467).

    The result has the format of `x`, also under autocast, where the weight's would keep PyTorch from its fused kernel.
    """

    eps: float
    # From rows, weight and eps to rows; None where it cannot take them. `native.kernels.use_native_kernels` puts it here.
    native: Callable[[Tensor, Tensor, float], Tensor | None] | None = None

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Normalises each row."""
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        if self.native is not None and (normed := self.native(x, weight, self.eps)) is not None:
            return normed
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNormOnCPU.apply(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """PyTorch 2.13 takes half a dozen passes over memory forwards on the CPU, and more than a dozen backwards.

    With `r = 1 / sqrt(mean(x²) + eps)` and `h = grad · weight` the gradient is `r (h - x r mean(h x r))`. LayerNorm's
    fused backward pass at mean 0 gives that less `r mean(h)`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        rows, row_grad, scale = x.reshape(-1, width), grad.reshape(-1, width), scale.view(-1, 1)
        x_grad, weight_grad, _ = torch.ops.aten.native_layer_norm_backward(
            row_grad,
            rows,
            weight.shape,
            torch.zeros_like(scale),
            scale,
            weight.to(scale.dtype),
            None,
            [True, True, False],
        )
        x_grad += (row_grad @ weight).unsqueeze(1) * scale / width
        return x_grad.view_as(x), weight_grad.to(weight.dtype), None
