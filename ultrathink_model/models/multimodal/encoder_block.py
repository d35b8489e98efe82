"""The block that both encoders are made of: CLIP's, SigLIP's and Whisper's is the same."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

POSITION_SPREAD = 0.02


def quick_gelu(x: Tensor) -> Tensor:
    """`x · σ(1.702 x)`, the activation that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


class QueriesKeysValues(nn.Module):
    """Queries, keys and values in one product, with a bias on queries and values.

    One on the keys would add the same to all of a query's logits and so change nothing, while AdamW would blow the
    rounding of its zero gradient up to full steps. CLIP and SigLIP have one, which is left out; Whisper has none.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.query_bias = nn.Parameter(torch.empty(width))
        self.value_bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "batch states width"]) -> Float[Tensor, "batch states triple"]:
        """The three, one behind the other."""
        bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        return F.linear(x, self.weight, bias)


class EncoderAttention(nn.Module):
    """Multi-head attention in which every state looks at every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = QueriesKeysValues(width)
        self.output = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch states width"], mask: Bool[Tensor, "batch 1 1 states"] | None
    ) -> Float[Tensor, "batch states width"]:
        """Mixes the states; `mask` is False at those that are not to be looked at."""
        batch, states, width = x.shape
        qkv = self.qkv(x).view(batch, states, 3, self.heads, -1)  # (batch, states, 3, heads, head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, states, head_dim)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.output(mixed.transpose(1, 2).reshape(batch, states, width))


class EncoderFeedForward(nn.Module):
    """`down(activation(up(x)))`."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "batch states width"]) -> Float[Tensor, "batch states width"]:
        """Applies the layer to each state on its own."""
        return self.down(self.activation(self.up(x)))


class EncoderBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`, with LayerNorm."""

    def __init__(self, width: int, heads: int, inner: int, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = EncoderAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width, eps=norm_eps)
        self.feed_forward = EncoderFeedForward(width, inner, activation)

    def forward(
        self, x: Float[Tensor, "batch states width"], mask: Bool[Tensor, "batch 1 1 states"] | None = None
    ) -> Float[Tensor, "batch states width"]:
        """The states after the block; see `EncoderAttention` for the mask."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


def draw_encoder(parameters: Iterable[tuple[str, Tensor]], layers: int, generator: torch.Generator) -> None:
    """Draws an encoder's weights in place: matrices at `1 / sqrt(fan_in)`, norms one, biases zero.

    What writes to the residual stream is scaled by `1 / sqrt(2 · layers)`. The decoder's fixed spread would leave
    pixels and frames, of which a patch holds few, without a voice beside their positions.
    """
    for name, weight in parameters:
        if name.endswith(("positions", "class_token")):
            weight.normal_(0.0, POSITION_SPREAD, generator=generator)
        elif weight.ndim == 1:
            weight.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            writes_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            spread = weight[0].numel() ** -0.5 * ((2 * layers) ** -0.5 if writes_residual else 1.0)
            weight.normal_(0.0, spread, generator=generator)
