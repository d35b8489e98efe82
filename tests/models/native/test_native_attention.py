"""Attention as one operator against PyTorch's operators in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models.native import attention
from ultrathink_model.models.native.attention import attend
from ultrathink_model.models.recomputation import KEPT
from ultrathink_model.models.tokens import Rotation

pytestmark = pytest.mark.usefixtures("build")
EPS = 1e-6


def draw(batch: int, seq: int, heads: int, kv_heads: int, width: int, spread: float = 1.0) -> list[Tensor]:
    """Queries, keys and values, and the weights of both norms."""
    generator = torch.Generator().manual_seed(seq)
    qkv = torch.randn(batch, seq, heads + 2 * kv_heads, width, generator=generator)
    weights = [1 + spread * torch.randn(width, generator=generator) for _ in range(2)]
    return [part.requires_grad_() for part in (qkv, *weights)]


def plain(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, rotation: Rotation, mask: Tensor | None, kv_heads: int
):
    """The same, one operator after another."""
    width = qkv.shape[-1]
    query, key, value = qkv.split((qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    query = rotation.apply(F.rms_norm(query, (width,), query_weight, EPS))
    key = rotation.apply(F.rms_norm(key, (width,), key_weight, EPS))
    parts = (part.transpose(1, 2) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(*parts, mask, is_causal=mask is None, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2)


def rotation_at(positions: Tensor, width: int) -> Rotation:
    return Rotation.table(1024, width, 1e4, torch.device("cpu")).at(positions)


def packed(seq: int) -> Tensor:
    """The mask of two rows with documents of 5 and of 70 tokens."""
    documents = torch.arange(seq) // torch.tensor([[5], [70]])
    return (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)


# Blocks have 96 queries: below, at and above it, and a last block of one. Weights up to 4 make some softmaxes hard.
@pytest.mark.parametrize("seq", [1, 5, 96, 97, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 16), (4, 2, 64), (6, 1, 48)])
@pytest.mark.parametrize("has_mask", [False, True])
def test_values_and_gradients_are_those_of_the_operators_in_float64(seq, heads, kv_heads, width, has_mask):
    mask = packed(seq) if has_mask else None
    positions = torch.arange(seq).unsqueeze(0)
    if has_mask:  # a table of its own for each sequence, as tokens have that were chosen from a longer row
        positions = positions * torch.tensor([[1], [3]])
    results = []
    for dtype in (torch.float32, torch.float64):
        operands = [part.detach().to(dtype).requires_grad_() for part in draw(2, seq, heads, kv_heads, width)]
        rotation = rotation_at(positions, width)
        if dtype == torch.float32:
            mixed = attend(*operands, rotation.cos, rotation.sin, mask, EPS, kv_heads)
        else:
            mixed = plain(*operands, rotation, mask, kv_heads)
        direction = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))
        mixed.backward(direction.to(dtype))
        results.append([mixed.detach(), *(operand.grad for operand in operands)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(
            ours.double(), reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max().clamp_min(1))
        )


def test_no_token_is_touched_by_what_it_may_not_see():
    seq, seen = 150, 97
    qkv, *weights = draw(2, seq, 2, 1, 16)
    rotation = rotation_at(torch.arange(seq).unsqueeze(0), 16)
    results = []
    for later in (1.0, 3.0):
        with torch.no_grad():
            changed = qkv.clone()
            changed[:, seen:] *= later
            results.append(attend(changed, *weights, rotation.cos, rotation.sin, None, EPS, 1)[:, :seen])
    assert torch.equal(*results)


def test_tokens_of_another_document_have_no_weight_at_all():
    seq = 140
    qkv, *weights = draw(2, seq, 2, 1, 16, spread=3.0)
    rotation = rotation_at(torch.arange(seq).unsqueeze(0), 16)
    mixed = attend(qkv, *weights, rotation.cos, rotation.sin, packed(seq), EPS, 1)
    mixed[1, 70:].sum().backward()
    assert not qkv.grad[1, :70].any()
    assert not qkv.grad[0].any()


def test_results_are_repeatable():
    operands = draw(3, 200, 4, 2, 32)
    rotation = rotation_at(torch.arange(200).unsqueeze(0), 32)
    results = []
    for _ in range(2):
        mixed = attend(*operands, rotation.cos, rotation.sin, None, EPS, 2)
        results.append([mixed, *torch.autograd.grad(mixed.square().sum(), operands)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_broken_numbers_come_through():
    operands = draw(1, 20, 2, 2, 16)
    with torch.no_grad():
        operands[0][0, 3, 2, 5] = torch.nan
    rotation = rotation_at(torch.arange(20).unsqueeze(0), 16)
    mixed = attend(*operands, rotation.cos, rotation.sin, None, EPS, 2)
    assert mixed[0, :3].isfinite().all()
    assert mixed[0, 3:, :16].isnan().all()


def test_what_it_is_not_made_for_is_left_to_the_operators(monkeypatch):
    operands = [part.detach() for part in draw(2, 5, 2, 1, 16)]
    rotation = rotation_at(torch.arange(5).unsqueeze(0), 16)
    table = (rotation.cos, rotation.sin)
    assert attend(*operands, *table, None, EPS, 1) is not None
    assert attend(*(part.double() for part in (*operands, *table)), None, EPS, 1) is None
    assert attend(*(part[..., :8] for part in (*operands, *table)), None, EPS, 1) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*operands, *table, None, EPS, 1) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert attend(*operands, *table, None, EPS, 1) is None


def test_operations_are_those_of_the_triangle():
    operands = draw(2, 10, 4, 2, 16)
    rotation = rotation_at(torch.arange(10).unsqueeze(0), 16)
    with FlopCounterMode(display=False) as counter:
        attend(*operands, rotation.cos, rotation.sin, None, EPS, 2).sum().backward()
    # Two products forwards and five backwards, which computes the scores again.
    assert counter.get_total_flops() == 7 * 2 * 2 * 4 * (10 * 11 // 2) * 16


def test_operators_keep_the_rules_that_compilation_relies_on():
    operands = [part.detach() for part in draw(2, 5, 2, 1, 16)]
    rotation = rotation_at(torch.arange(5).unsqueeze(0), 16)
    given = (*operands, rotation.cos, rotation.sin, packed(5))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention.ATTENTION, (*given, EPS, 1), test_utils=checks)
    out, log_sum = attention.ATTENTION(*given, EPS, 1)
    torch.library.opcheck(attention.ATTENTION_GRAD, (out, *given, out, log_sum, EPS, 1), test_utils=checks)


def test_selective_recomputation_keeps_its_result():
    assert attention.ATTENTION in KEPT
