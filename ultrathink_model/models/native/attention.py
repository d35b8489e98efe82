"""Attention as one operator from the product for queries, keys and values on: norms, rotation, weights and mixing.

Apart, these are two dozen passes over memory beside the products; here a head's operands stay in a processor's cache,
and its small products in the registers, at the rate of large ones.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ultrathink_model.models.native.library import call, define, num_threads, takes
from ultrathink_model.models.recomputation import KEPT

# The width of a head is a multiple of it: as in attention.cpp.
COLUMNS = 16


def attend(
    qkv: Float[Tensor, "batch seq heads_and_kv head_dim"],
    query_weight: Float[Tensor, " head_dim"],
    key_weight: Float[Tensor, " head_dim"],
    cos: Float[Tensor, "#batch seq 1 head_dim"],
    sin: Float[Tensor, "#batch seq 1 head_dim"],
    mask: Bool[Tensor, "#batch 1 seq seq"] | None,
    eps: float,
    num_kv_heads: int,
) -> Float[Tensor, "batch seq width"] | None:
    """`softmax(rope(norm(q)) · rope(norm(k)) / sqrt(head_dim) + causal mask) · v`; None where it is not for us.

    Only float32 is, on a processor, with heads of a multiple of 16 and a head of keys at least for each thread.

    Args:
        qkv: Queries, keys and values.
        query_weight: Weight of the RMSNorm of queries.
        key_weight: Weight of the RMSNorm of keys.
        cos: Cosines of the rotation at each position.
        sin: Sines, those of the first half negative.
        mask: What each token may look at: itself, and some of those before it; None for all of them.
        eps: The norms'.
        num_kv_heads: Heads of keys, and of values.
    """
    batch, _, _, width = qkv.shape
    if not takes(qkv, query_weight, key_weight, cos, sin) or width % COLUMNS:
        return None
    if batch * num_kv_heads < num_threads() or (mask is not None and mask.dtype != torch.bool):
        return None
    out: Tensor = _Attention.apply(qkv, query_weight, key_weight, cos, sin, mask, eps, num_kv_heads)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        eps: float,
        num_kv_heads: int,
    ) -> Tensor:
        operands = (qkv, query_weight, key_weight, cos, sin, mask)
        out, log_sum = ATTENTION(*operands, eps, num_kv_heads)
        ctx.save_for_backward(*operands, out, log_sum)
        ctx.options = (eps, num_kv_heads)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv_grad, weight_grad = ATTENTION_GRAD(grad, *ctx.saved_tensors, *ctx.options)
        query_weight_grad, key_weight_grad = weight_grad.sum(dim=0)
        return qkv_grad, query_weight_grad, key_weight_grad, None, None, None, None, None


def _run(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    eps: float,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor]:
    out, log_sum = _empty(qkv, query_weight, key_weight, cos, sin, mask, eps, num_kv_heads)
    given = [None if x is None else x.contiguous() for x in (qkv, query_weight, key_weight, cos, sin, mask)]
    call("attention", [*given, out, log_sum], _sizes(qkv, cos, mask, num_kv_heads), eps)
    return out, log_sum


def _run_grad(
    grad: Tensor,
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    eps: float,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor]:
    tensors = (grad, qkv, query_weight, key_weight, cos, sin, mask, out, log_sum)
    results = _empty_grad(*tensors, eps, num_kv_heads)
    given = [None if x is None else x.contiguous() for x in tensors]
    call("attention_grad", [*given, *results], _sizes(qkv, cos, mask, num_kv_heads), eps)
    return results


def _sizes(qkv: Tensor, cos: Tensor, mask: Tensor | None, num_kv_heads: int) -> list[int]:
    batch, seq, heads_and_kv, width = qkv.shape
    masks = 1 if mask is None else mask.shape[0]
    return [batch, seq, heads_and_kv - 2 * num_kv_heads, num_kv_heads, width, cos.shape[0], masks]


def _empty(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, seq, heads_and_kv, width = qkv.shape
    heads = heads_and_kv - 2 * arguments[-1]
    return qkv.new_empty(batch, seq, heads * width), qkv.new_empty(batch, heads, seq)


def _empty_grad(_grad: Tensor, qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, _, _, width = qkv.shape
    return qkv.new_empty(qkv.shape), qkv.new_empty(batch * arguments[-1], 2, width)


_OPERANDS = "Tensor qkv, Tensor query_weight, Tensor key_weight, Tensor cos, Tensor sin, Tensor? mask"
ATTENTION = define(f"attention({_OPERANDS}, float eps, int num_kv_heads) -> (Tensor, Tensor)", _run, _empty)
ATTENTION_GRAD = define(
    f"attention_grad(Tensor grad, {_OPERANDS}, Tensor out, Tensor log_sum, float eps, int num_kv_heads) -> (Tensor, Tensor)",
    _run_grad,
    _empty_grad,
)
KEPT.append(ATTENTION)


def _operations(qkv: Any, num_kv_heads: int, products: int) -> int:
    """Of products between each query and the keys up to it."""
    batch, seq, heads_and_kv, width = qkv
    return products * batch * (heads_and_kv - 2 * num_kv_heads) * seq * (seq + 1) * width


@register_flop_formula([ATTENTION.overloadpacket])
def _forward_operations(qkv: Any, *arguments: Any, **_: Any) -> int:
    return _operations(qkv, arguments[-1], products=2)


@register_flop_formula([ATTENTION_GRAD.overloadpacket])
def _backward_operations(_grad: Any, qkv: Any, *arguments: Any, **_: Any) -> int:
    return _operations(qkv, arguments[-1], products=5)
