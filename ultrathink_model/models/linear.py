"""Linear layers whose products in training go to the faster of PyTorch's two libraries for the CPU."""

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

# Multiplications of a product from which on the faster library makes up for turning operands and compiling kernels.
SMALLEST = 1 << 28
# Namespace of the operator below: one a copy of this module, since each folder of an exported model holds one.
NAMESPACE = re.sub(r"\W", "_", __name__)


def _onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, which MKL, PyTorch's library for float32 products, leaves unused.

    There oneDNN takes 7/8 of the time of MKL; on an older AMD, without AVX-512, MKL is the faster.
    """
    cpuinfo = Path("/proc/cpuinfo")
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    cpu = cpuinfo.read_text() if has_operator and cpuinfo.exists() else ""
    return "AuthenticAMD" in cpu and "avx512f" in cpu


ONEDNN_IS_FASTER = _onednn_is_faster()


class Linear(nn.Linear):
    """`x · weightᵀ`, without a bias; in training by oneDNN where that is faster."""

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


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return onednn_linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else onednn_linear(grad, weight.T),
            None if x is None else _weight_grad(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])),
        )


def _weight_grad(grad: Float[Tensor, "rows outer"], x: Float[Tensor, "rows inner"]) -> Float[Tensor, "outer inner"]:
    """`gradᵀ · x`. The library wants each row of its first operand together; turning the narrower one costs less."""
    if x.shape[1] <= grad.shape[1]:
        return onednn_linear(x.T.contiguous(), grad.T).T.contiguous()
    return onednn_linear(grad.T.contiguous(), x.T)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _empty_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _count_operations(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """For `torch.utils.flop_counter`, which gives the shapes."""
    return 2 * torch.Size(x).numel() * weight[0]


# An operator of ours around oneDNN's: the compiler takes the weight of that one to be a constant. Defined by hand, since
# `torch.library.custom_op` puts more around each call.
_operators = getattr(torch.ops, NAMESPACE)
if not hasattr(_operators, "onednn_linear"):  # the module may be executed again
    torch.library.define(f"{NAMESPACE}::onednn_linear", "(Tensor x, Tensor weight) -> Tensor")
    torch.library.impl(f"{NAMESPACE}::onednn_linear", "cpu", _multiply)
    torch.library.register_fake(f"{NAMESPACE}::onednn_linear", _empty_product)
    register_flop_formula([_operators.onednn_linear])(_count_operations)
