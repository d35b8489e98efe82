"""Attention against its formula written out, and whom each token may see."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from ultrathink_model.models.attention import Attention, FeedForward
from ultrathink_model.models.tokens import Rotation, Tokens
from ultrathink_model.models.transformer import build_model

SEQ = 13


@pytest.fixture
def attention(small_config):
    """`attention("model.num_kv_heads=1", …)`: a layer with wide random weights and head width 8."""

    def build(*overrides: str) -> Attention:
        return build_model(small_config("model.initializer_range=0.3", *overrides)).blocks[0].attention

    return build


def states(batch: int = 2, seq: int = SEQ, seed: int = 0) -> Tensor:
    return torch.randn(batch, seq, 32, generator=torch.Generator().manual_seed(seed))


def grid(seq: int = SEQ, start: int = 0, **parts: object) -> Tokens:
    return Tokens(torch.arange(start, start + seq).unsqueeze(0), **parts)


def run(layer: Attention, x: Tensor, tokens: Tokens) -> Tensor:
    table = Rotation.table(64, layer.head_dim, 10_000.0, x.device)
    return layer(x, tokens, table.at(tokens.positions))


def written_out(layer: Attention, x: Tensor, allowed: Tensor) -> Tensor:
    """The layer one query head at a time, by complex rotation; `allowed` (batch, query, key)."""
    width, heads = layer.head_dim, layer.num_heads
    angles = torch.arange(x.shape[1]).unsqueeze(1) * 10_000.0 ** (-torch.arange(width // 2) * 2 / width)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(part: Tensor, scale: Tensor) -> Tensor:
        part = F.rms_norm(part, (width,), scale, eps=1e-6)
        turned = torch.complex(*part.chunk(2, dim=-1)) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    mixed = []
    parts = layer.qkv(x).split(width, dim=-1)
    for head in range(heads):
        shared = heads + head * layer.num_kv_heads // heads
        query = rotated(parts[head], layer.query_norm.weight)
        key = rotated(parts[shared], layer.key_norm.weight)
        scores = (query @ key.transpose(1, 2) / width**0.5).masked_fill(~allowed, -torch.inf)
        mixed.append(scores.softmax(dim=-1) @ parts[shared + layer.num_kv_heads])
    return layer.output(torch.cat(mixed, dim=-1))


def triangle(seq: int = SEQ) -> Tensor:
    return torch.ones(seq, seq, dtype=torch.bool).tril().unsqueeze(0)


@torch.no_grad()
@pytest.mark.parametrize("fused", ["true", "false"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 2, SEQ, 33])
def test_output_equals_the_formula(attention, kv_heads, fused, seq):
    layer = attention(f"model.num_kv_heads={kv_heads}", f"model.use_flash_attention={fused}")
    x = states(seq=seq)
    torch.testing.assert_close(run(layer, x, grid(seq)), written_out(layer, x, triangle(seq)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fused", ["true", "false"])
def test_window_documents_and_padding_bound_what_is_seen(attention, fused):
    layer = attention(f"model.use_flash_attention={fused}")
    x = states()
    near = triangle() & torch.ones(SEQ, SEQ, dtype=torch.bool).triu(-3)
    documents = torch.tensor([[0] * 5 + [1] * 8, [4] * 12 + [9]])
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    valid = torch.arange(SEQ) >= torch.tensor([[0], [6]])
    cases = [
        (grid(sliding_window=4), near, slice(None)),
        (grid(document_ids=documents), triangle() & same, slice(None)),
        (grid(document_ids=documents, sliding_window=4), near & same, slice(None)),
        (grid(valid=valid), triangle() & (valid.unsqueeze(1) | torch.eye(SEQ, dtype=torch.bool)), valid),
    ]
    for tokens, allowed, real in cases:
        expected = written_out(layer, x, allowed.expand(2, -1, -1))
        torch.testing.assert_close(run(layer, x, tokens)[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_window_as_long_as_the_text_is_no_window():
    assert grid(sliding_window=SEQ).self_mask is None
    assert grid(sliding_window=SEQ - 1).self_mask is not None
    assert grid().self_mask is None


@torch.no_grad()
def test_only_distance_matters_to_rotation(attention):
    layer, x = attention(), states()
    torch.testing.assert_close(run(layer, x, grid(start=40)), run(layer, x, grid()), atol=1e-5, rtol=1e-5)


def test_gradient_of_rotation_equals_finite_differences():
    table = Rotation.table(7, 6, 10.0, torch.device("cpu")).at(torch.arange(7).unsqueeze(0))
    x = torch.randn(2, 7, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert gradcheck(table.apply, (x,))


@torch.no_grad()
def test_row_of_padding_stays_finite(attention):
    valid = torch.tensor([[True] * SEQ, [False] * SEQ])
    assert run(attention(), states(), grid(valid=valid)).isfinite().all()


def test_selected_tokens_keep_what_is_known_of_them():
    documents = torch.tensor([[0] * 5 + [1] * 8, [2] * 13])
    tokens = grid(document_ids=documents, valid=documents < 2, source_groups=documents + 1, sliding_window=3)
    index = torch.tensor([[0, 4, 5], [1, 2, 12]])
    chosen = tokens.select(index)
    assert chosen.positions.tolist() == index.tolist()
    assert chosen.document_ids.tolist() == [[0, 0, 1], [2, 2, 2]]
    assert chosen.valid.tolist() == [[True] * 3, [False] * 3]
    assert chosen.source_groups.tolist() == [[1, 1, 2], [3, 3, 3]]
    assert chosen.sliding_window == 3
    assert chosen.self_mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, False, True]]


@torch.no_grad()
def test_feed_forward_is_swiglu(small_config):
    layer = FeedForward(small_config())
    gate, up = layer.gate_up.weight.chunk(2)
    x = states()
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert layer.down.weight.shape == (32, 48)
