"""The decoder as a graph of fixed shape: what a format can hold that knows no code and no cache."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ultrathink_model.models.attention import Attention
from ultrathink_model.models.moe import MixtureOfExperts
from ultrathink_model.models.norm import RMSNorm
from ultrathink_model.models.reasoning import MAX_PASSES, DepthRouter
from ultrathink_model.models.tokens import Rotation
from ultrathink_model.models.transformer import Block, Transformer


class StaticDecoder(nn.Module):
    """A trained decoder without anything that depends on values.

    Every expert and every pass is computed for every token, and what was not chosen is weighted with zero: the same
    function, at the cost of all experts and of all passes. The keys that a routed block may look at are masked, where the
    decoder leaves them out.

    Args:
        model: The decoder, whose weights are taken as they are.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        shape = model.config.model
        self.model = model
        self.window = shape.sliding_window
        table = Rotation.table(shape.max_seq_length, shape.head_size, shape.rope_theta, torch.device("cpu"))
        self.register_buffer("cos", table.cos)
        self.register_buffer("sin", table.sin)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Logits (batch, seq, vocab) of (batch, seq) tokens without padding, and with a harm head the harm of each prefix.

        Harm is a probability for each category, (batch, seq, categories).
        """
        model, seq = self.model, input_ids.shape[1]
        positions = torch.arange(seq)
        distance = positions[:, None] - positions
        seen = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        seen = seen[None, None]  # (1, 1, seq, seq)
        x = model.embedding(input_ids)
        for block in model.blocks:
            assert isinstance(block, Block)
            if block.depth_router is None:
                keys = self._keys(block, x)
                x = x + self._residual(block, x, keys, seen)
            else:
                x = self._deepen(block, block.depth_router, x, seen)
        hidden = _normed(model.norm, x)
        logits = F.linear(hidden, model.output_weight)
        if model.harm_head is None:
            return (logits,)
        return logits, F.linear(hidden, model.harm_head.weight, model.harm_head.bias).sigmoid()

    def _deepen(self, block: Block, router: DepthRouter, x: Tensor, seen: Tensor) -> Tensor:
        """A block with the passes that its router gives each token; see `DepthRouter`."""
        logits = F.linear(F.rms_norm(x, x.shape[-1:], eps=router.norm_eps), router.router.weight).squeeze(-1)
        # Before its first choice a router's thresholds are infinite: comparing keeps them out of the arithmetic.
        asked = torch.ones_like(logits, dtype=torch.bool)
        keys = self._keys(block, x)
        for depth in range(MAX_PASSES):
            if router.forced and not router.shares[depth]:
                break
            if not router.forced:
                asked = asked & (logits > router.thresholds[depth])
            if depth == 0:
                # A token may always look at itself, or what is not chosen would have an empty softmax.
                own = torch.eye(x.shape[1], dtype=torch.bool)
                seen = (seen & asked[:, None, None]) | own
            gate = 2 * logits.sigmoid()
            if depth > 0:
                gate = gate * router.strengths[depth - 1].tanh()
            change = gate.unsqueeze(-1) * self._residual(block, x, keys, seen)
            x = torch.where(asked.unsqueeze(-1), x + change, x)
        return x

    def _residual(self, block: Block, x: Tensor, keys: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """What one pass of a block adds to the residual stream."""
        attention = block.attention
        query, _, _ = self._project(attention, _normed(block.attention_norm, x))
        query = self._turned(_normed(attention.query_norm, query))
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), *keys, attn_mask=seen)
        attended = attention.output(mixed.transpose(1, 2).flatten(2))
        normed = _normed(block.feed_forward_norm, x + attended)
        feed_forward = block.feed_forward
        if isinstance(feed_forward, MixtureOfExperts):
            return attended + _mixed_experts(feed_forward, normed)
        return attended + feed_forward.down(_gated(feed_forward.gate_up(normed)))

    def _keys(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every token, repeated for each query head: (batch, heads, seq, head_dim)."""
        attention = block.attention
        _, key, value = self._project(attention, _normed(block.attention_norm, x))
        key = self._turned(_normed(attention.key_norm, key))
        copies = attention.num_heads // attention.num_kv_heads
        return tuple(part.transpose(1, 2).repeat_interleave(copies, dim=1) for part in (key, value))  # type: ignore[return-value]

    def _project(self, attention: Attention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = attention.qkv(normed).unflatten(-1, (-1, attention.head_dim))  # (batch, seq, heads, head_dim)
        query, key, value = heads.split((attention.num_heads, attention.num_kv_heads, attention.num_kv_heads), dim=2)
        return query, key, value

    def _turned(self, heads: Tensor) -> Tensor:
        """(batch, seq, heads, head_dim) turned by the angle of each position."""
        cos, sin = self.cos[: heads.shape[1], None], self.sin[: heads.shape[1], None]
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((second, first), dim=-1) * sin


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _mixed_experts(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """All experts on all tokens, weighted; zero for those that a token does not take."""
    rows = x.flatten(0, 1)  # (tokens, hidden)
    logits = F.linear(rows, mixture.router.weight)
    probabilities = logits.softmax(dim=-1)
    chosen = probabilities if mixture.router_bias is None else logits + mixture.router_bias
    experts = chosen.topk(mixture.top_k, dim=-1).indices
    weights = probabilities.gather(1, experts)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    scale = torch.zeros_like(logits).scatter(1, experts, weights)  # (tokens, experts)
    inner = _gated(rows.unsqueeze(0) @ mixture.gate_up.mT)  # (experts, tokens, width)
    out = (inner * scale.T.unsqueeze(-1)) @ mixture.down.mT  # (experts, tokens, hidden)
    return out.sum(dim=0).view_as(x)
