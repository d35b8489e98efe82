"""Causal attention over short sequences on the CPU, in blocks of queries."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Queries of a block. A block meets the keys up to its own end, so smaller blocks skip more of the upper triangle.
BLOCK = 64
# The weights that the backward pass reads again grow with the square of the length.
LONGEST = 512
# Namespace of the operators below: one a copy of this module, since each folder of an exported model holds one.
NAMESPACE = re.sub(r"\W", "_", __name__)


def takes_blocks(query: Float[Tensor, "batch heads seq head_dim"]) -> bool:
    """Whether these queries are best attended in blocks: exact formats on the CPU, and neither one token nor many."""
    exact = query.dtype in (torch.float32, torch.float64)
    return exact and query.device.type == "cpu" and 1 < query.shape[2] <= LONGEST


def blocked_attention(
    query: Float[Tensor, "batch heads seq head_dim"],
    key: Float[Tensor, "batch kv_heads seq head_dim"],
    value: Float[Tensor, "batch kv_heads seq head_dim"],
    mask: Bool[Tensor, "#batch 1 seq seq"] | None = None,
) -> Float[Tensor, "batch heads seq head_dim"]:
    """`softmax(q · kᵀ / sqrt(head_dim) + causal mask) · v`.

    PyTorch's fused kernel works head by head on products too small for the processor. Here one batched product takes
    a block of queries of all heads, and the softmax is kept for the backward pass: two thirds of the kernel's time.

    Args:
        query: Queries.
        key: Keys of the same tokens.
        value: Values of the same tokens.
        mask: What each token may look at: itself, and some of those before it; None for all of them.
    """
    # Both passes read each block's rows several times.
    return _blocked_attention(query.contiguous(), key.contiguous(), value.contiguous(), mask)[0]


@torch.library.custom_op(f"{NAMESPACE}::blocked_attention", mutates_args=())
def _blocked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mixed values, and the weights of all blocks one after the other."""
    batch, heads, seq, width = query.shape
    out = query.new_empty(batch, seq, heads, width).transpose(1, 2)
    kept = query.new_empty(_num_weights(query))
    keys, values = key.flatten(0, 1), value.flatten(0, 1)  # (batch · kv_heads, seq, head_dim)
    hidden = torch.ones(1, 1, seq, seq, dtype=torch.bool).triu(1) if mask is None else ~mask
    for rows, weights in _blocks(query, key, kept):
        past = keys[:, : rows.stop].mT
        scores = weights.baddbmm_(_of_block(query, key, rows), past, beta=0, alpha=width**-0.5)
        of_heads = scores.view(batch, key.shape[1], -1, rows.stop - rows.start, rows.stop)
        reach = rows if mask is None else slice(0, rows.stop)  # without a mask all before the block is seen
        of_heads[..., reach].masked_fill_(hidden[:, :, None, rows, reach], -torch.inf)
        torch.softmax(scores, dim=-1, out=scores)
        _of_grid(out, key, rows).copy_(torch.bmm(scores, values[:, : rows.stop]).view_as(_of_grid(out, key, rows)))
    return out, kept


@torch.library.custom_op(f"{NAMESPACE}::blocked_attention_backward", mutates_args=())
def _blocked_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    query_grad, keys_grad, values_grad = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, weights in _blocks(query, key, kept):
        out_grad, past = _of_block(grad, key, rows), slice(rows.stop)
        # Added apart: a product that adds into a part of a tensor goes matrix by matrix.
        values_grad[:, past].add_(torch.bmm(weights.mT, out_grad))
        weights_grad = torch.bmm(out_grad, values[:, past].mT)
        scores_grad = torch.ops.aten._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
        part = torch.bmm(scores_grad, keys[:, past])
        torch.mul(part.view_as(_of_grid(query, key, rows)), scale, out=_of_grid(query_grad, key, rows))
        keys_grad[:, past].add_(torch.bmm(scores_grad.mT, _of_block(query, key, rows)), alpha=scale)
    return query_grad, keys_grad.view(key.shape), values_grad.view(value.shape)


def _num_weights(query: Tensor) -> int:
    batch, heads, seq, _ = query.shape
    return batch * heads * sum((rows.stop - rows.start) * rows.stop for rows in _rows(seq))


def _rows(seq: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, seq)) for start in range(0, seq, BLOCK))


def _blocks(query: Tensor, key: Tensor, kept: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Each block's rows and the part of `kept` for its weights, (batch · kv_heads, queries, keys)."""
    batch, heads, seq, _ = query.shape
    begin = 0
    for rows in _rows(seq):
        size = batch * heads * (rows.stop - rows.start) * rows.stop
        yield rows, kept[begin : begin + size].view(batch * key.shape[1], -1, rows.stop)
        begin += size


def _of_grid(x: Tensor, key: Tensor, rows: slice) -> Tensor:
    """Rows of (batch, heads, seq, head_dim), as (batch, kv_heads, heads of a group, rows, head_dim)."""
    return x[:, :, rows].unflatten(1, (key.shape[1], -1))


def _of_block(x: Tensor, key: Tensor, rows: slice) -> Tensor:
    """The same as (batch · kv_heads, heads of a group · rows, head_dim): what shares keys is one matrix."""
    return _of_grid(x, key, rows).flatten(2, 3).flatten(0, 1)


@_blocked_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, seq, width = query.shape
    return query.new_empty(batch, seq, heads, width).transpose(1, 2), query.new_empty(_num_weights(query))


@_blocked_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_operands(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def _backward(ctx: Any, grad: Tensor, _kept_grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_blocked_attention_backward(grad, *ctx.saved_tensors), None


_blocked_attention.register_autograd(_backward, setup_context=_save_operands)
