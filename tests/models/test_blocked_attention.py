"""Attention in blocks against PyTorch's, and its gradients by finite differences."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from ultrathink_model.models.blocked_attention import BLOCK, LONGEST, blocked_attention, takes_blocks


def heads(seq: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values as attention has them: heads of a token side by side in memory."""
    generator = torch.Generator().manual_seed(0)
    parts = (torch.randn(2, seq, n, 8, generator=generator) for n in (num_heads, num_kv_heads, num_kv_heads))
    return [part.to(dtype).transpose(1, 2).requires_grad_() for part in parts]


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)


def packed(seq: int) -> Tensor:
    """The mask of two rows with documents of 5 and of 70 tokens."""
    documents = torch.arange(seq) // torch.tensor([[5], [70]])
    return (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)


@pytest.mark.parametrize("seq", [2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("has_mask", [False, True])
def test_values_and_gradients_equal_the_fused_kernels(seq, num_heads, num_kv_heads, has_mask):
    ours, theirs = heads(seq, num_heads, num_kv_heads), heads(seq, num_heads, num_kv_heads)
    mask = packed(seq) if has_mask else None
    result, expected = blocked_attention(*ours, mask), fused(*theirs, mask)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    result.backward(direction)
    expected.backward(direction)
    for own, other in zip(ours, theirs, strict=True):
        # Sums over up to 200 positions of values of the order of 1.
        torch.testing.assert_close(own.grad, other.grad, atol=2e-5, rtol=1e-5)


def test_gradients_equal_finite_differences(monkeypatch):
    monkeypatch.setattr("ultrathink_model.models.blocked_attention.BLOCK", 3)
    assert gradcheck(blocked_attention, heads(7, 4, 2, torch.float64))
    assert gradcheck(lambda *parts: blocked_attention(*parts, packed(7)), heads(7, 4, 2, torch.float64))


def test_operators_keep_the_rules_that_compilation_relies_on():
    operator = torch.ops.ultrathink_model_models_blocked_attention.blocked_attention.default
    operands = [*(part.detach().contiguous().requires_grad_() for part in heads(5, 4, 2)), None]
    torch.library.opcheck(
        operator, operands, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_one_token_many_tokens_and_short_formats_go_to_the_fused_kernels():
    assert takes_blocks(torch.empty(1, 1, LONGEST, 8))
    assert not takes_blocks(torch.empty(1, 1, 1, 8))
    assert not takes_blocks(torch.empty(1, 1, LONGEST + 1, 8))
    assert not takes_blocks(torch.empty(1, 1, 16, 8, dtype=torch.bfloat16))
