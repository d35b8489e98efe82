"""Linear layers whose products in training go to the faster of PyTorch's two libraries for the CPU."""

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

# Multiplications of a product from which on the faster library makes up for calling it.
SMALLEST = 1 << 24
# Namespace of the operator below: one a copy of this module, since each folder of an exported model holds one.
NAMESPACE = re.sub(r"\W", "_", __name__)


def _onednn_is_faster() -> bool:
    """Whether this processor is AMD's, where oneDNN takes 7/8 of the time of MKL, in which PyTorch has float32 products."""
    cpu = Path("/proc/cpuinfo")
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operator and cpu.exists() and "AuthenticAMD" in cpu.read_text()


ONEDNN_IS_FASTER = _onednn_is_faster()


class Linear(nn.Linear):
    """`x · weightᵀ`, without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
        """Applies the matrix to each row."""
        # Not in generation: oneDNN compiles a kernel for each new shape.
        if self.training and torch.is_grad_enabled() and takes_onednn(x, self.weight):
            return _OneDNNLinear.apply(x, self.weight)
        return super().forward(x)


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether these are multiplied faster by oneDNN."""
    return (
        ONEDNN_IS_FASTER
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= SMALLEST
        # A tensor that is cut over ranks has products of its own.
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_linear(
    x: Float[Tensor, "*rows inner"], weight: Float[Tensor, "outer inner"]
) -> Float[Tensor, "*rows outer"]:
    """`x · weightᵀ`, which autograd does not follow; the weight may be a transposed view."""
    return _operators.onednn_linear(x, weight)


def onednn_weight_grad(
    grad: Float[Tensor, "*rows outer"], x: Float[Tensor, "*rows inner"]
) -> Float[Tensor, "outer inner"]:
    """The gradient of the weight of `onednn_linear`: `gradᵀ · x` over all rows."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    # The library wants each row of its first operand together in memory. Turning the narrower one costs less.
    if x.shape[1] <= grad.shape[1]:
        return onednn_linear(x.T.contiguous(), grad.T).T.contiguous()
    return onednn_linear(grad.T.contiguous(), x.T)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_grad = onednn_linear(grad, weight.T) if ctx.needs_input_grad[0] else None
        weight_grad = onednn_weight_grad(grad, x) if ctx.needs_input_grad[1] else None
        return x_grad, weight_grad


# An operator of ours around oneDNN's: the compiler takes the weight of that one to be a constant. Defined by hand, since
# what `torch.library.custom_op` puts around each call takes as long as the smallest products.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("onednn_linear(Tensor x, Tensor weight) -> Tensor")
_operators = getattr(torch.ops, NAMESPACE)


@torch.library.impl(_library, "onednn_linear", "CPU")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@torch.library.register_fake(f"{NAMESPACE}::onednn_linear", lib=_library)
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula([_operators.onednn_linear])
def _linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * torch.Size(x).numel() * weight[0]
