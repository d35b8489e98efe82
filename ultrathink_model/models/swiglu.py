"""The gated activation of feed-forwards and experts, which keeps only its input for the backward pass."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def swiglu(
    gate_up: Float[Tensor, "*rows double"], scale: Float[Tensor, "*rows 1"] | None = None
) -> Float[Tensor, "*rows half"]:
    """`silu(gate) · up` of the two halves of the last axis (Shazeer 2020, arXiv 2002.05202), times `scale`.

    Autograd would keep `silu(gate)` as well, and the product before it is scaled. A compiler knows that by itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, dim=-1)
        inner = F.silu(gate) * up
        return inner if scale is None else inner * scale
    return _SwiGLU.apply(gate_up, scale)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, scale)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = F.silu(gate).mul_(up)
        return inner if scale is None else inner.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, scale = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        active, scale_grad = F.silu(gate), None
        if scale is not None:
            scale_grad = (grad * up).mul_(active).sum(dim=-1, keepdim=True)
            grad = grad * scale
        gate_up_grad = torch.empty_like(gate_up)
        gate_grad, up_grad = gate_up_grad.chunk(2, dim=-1)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=gate_grad)
        torch.mul(active, grad, out=up_grad)
        return gate_up_grad, scale_grad
