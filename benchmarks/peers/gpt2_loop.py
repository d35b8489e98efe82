"""A plain training loop over a GPT-2 shaped decoder, the way that small self-contained trainers are written.

LayerNorm without biases, learned positions, GELU, tied embeddings, fused AdamW, cosine schedule, clipping: what
nanoGPT (https://github.com/karpathy/nanoGPT) trains with its defaults for a processor.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        batch, seq, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT2Style(nn.Module):
    """The decoder; `forward` gives the mean cross-entropy."""

    def __init__(self, vocab_size: int, block_size: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(
                    weight, 0.0, 0.02 / math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 0.02
                )

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.norm(x), self.tokens.weight).flatten(0, 1), targets.flatten())


def windows(stream: Tensor, block_size: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of windows at random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - block_size, (batch_size,), generator=generator)
        rows = torch.stack([stream[start : start + block_size + 1] for start in starts.tolist()])
        yield rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def loss_over(model: nn.Module, stream: Tensor, block_size: int) -> float:
    """The mean loss over a whole stream, each token predicted once."""
    count = (len(stream) - 1) // block_size
    rows = stream[: count * block_size + 1]
    inputs, targets = rows[:-1].view(count, block_size), rows[1:].view(count, block_size)
    parts = [model(x, y).item() * len(x) for x, y in zip(inputs.split(64), targets.split(64), strict=True)]
    return sum(parts) / count


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float = 1e-3,
    warmup: int = 100,
    pass_on: Callable[[], None] | None = None,
) -> None:
    """Trains; `pass_on` is called after each step."""
    decayed = [weight for weight in model.parameters() if weight.ndim >= 2]
    plain = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        share = min(1.0, (step + 1) / warmup)
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate * share * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        loss = model(*next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if pass_on is not None:
            pass_on()
