"""Causal self-attention with grouped queries and normalised queries and keys."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ultrathink_model.config import Config
from ultrathink_model.models.blocked_attention import blocked_attention, takes_blocks
from ultrathink_model.models.linear import Linear
from ultrathink_model.models.norm import RMSNorm
from ultrathink_model.models.swiglu import swiglu
from ultrathink_model.models.tokens import Rotation, Tokens

# From queries, keys and values, both norms' weights, the rotation, the mask, eps and heads of keys to mixed values;
# and from rows and both matrices to rows. None where it cannot take them.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float, int], Tensor | None]
Feed = Callable[[Tensor, Tensor, Tensor], Tensor | None]


@runtime_checkable
class LayerCache(Protocol):
    """The keys and values that one attention layer keeps between calls."""

    def append(self, keys: Tensor, values: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds (batch, kv_heads, seq, head_dim) of new tokens.

        Returns all keys, all values, and the mask (batch, 1, seq, all) of what the new tokens may look at, or None
        where the new tokens are the first and the causal triangle says it all, or a single one that sees all.
        """
        ...


class Attention(nn.Module):
    """Grouped-query attention as in Qwen3: one product for queries, keys and values, RMSNorm on each head.

    `out = softmax(rope(norm(q)) · rope(norm(k)) / sqrt(head_dim) + mask) · v`, by PyTorch's fused kernels.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.num_heads, self.num_kv_heads, self.head_dim = model.num_heads, model.kv_heads, model.head_size
        self.fused_kernels = model.use_flash_attention
        self.qkv = Linear(model.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim)
        self.query_norm = RMSNorm(self.head_dim, eps=model.norm_eps)
        self.key_norm = RMSNorm(self.head_dim, eps=model.norm_eps)
        self.output = Linear(self.num_heads * self.head_dim, model.hidden_size)
        # `native.kernels.use_native_kernels` puts its own here.
        self.native: Attend | None = None

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        tokens: Tokens,
        rotation: Rotation,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Mixes each token with those it may see; `rotation` holds the rows of the tokens' positions."""
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, -1, self.head_dim)  # (batch, seq, heads + 2 kv_heads, head_dim)
        if self.native is not None and self.fused_kernels and cache is None:
            weights, eps = (self.query_norm.weight, self.key_norm.weight), self.query_norm.eps
            attended = self.native(qkv, *weights, rotation.cos, rotation.sin, tokens.self_mask, eps, self.num_kv_heads)
            if attended is not None:
                return self.output(attended)
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        query = rotation.apply(self.query_norm(query)).transpose(1, 2)  # (batch, heads, seq, head_dim)
        key = rotation.apply(self.key_norm(key)).transpose(1, 2)  # (batch, kv_heads, seq, head_dim)
        value = value.transpose(1, 2)
        if cache is None:
            mask = tokens.self_mask
        else:
            key, value, mask = cache.append(key, value, tokens)
        if self.fused_kernels and takes_blocks(query) and (mask is None or cache is None):
            mixed = blocked_attention(query, key, value, mask)
        else:
            mixed = self._attend(query, key.to(query.dtype), value.to(query.dtype), mask)
        return self.output(mixed.transpose(1, 2).reshape(batch, seq, -1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        grouped = self.num_kv_heads != self.num_heads
        triangle = mask is None and query.shape[2] > 1
        if self.fused_kernels:
            return F.scaled_dot_product_attention(query, key, value, mask, is_causal=triangle, enable_gqa=grouped)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, mask, is_causal=triangle, enable_gqa=grouped)


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) · up(x))`, gate and up in one product."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.model.feed_forward_size
        self.gate_up = Linear(config.model.hidden_size, 2 * width)
        self.down = Linear(width, config.model.hidden_size)
        self.native: Feed | None = None

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Applies the block to each row on its own."""
        if self.native is not None and (fed := self.native(x, self.gate_up.weight, self.down.weight)) is not None:
            return fed
        return self.down(swiglu(self.gate_up(x)))
