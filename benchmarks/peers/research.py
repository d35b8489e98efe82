"""The kind of decoder that one-file research codebases train: squared ReLU, norms without weights, a plain loop."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peers.hugging_face import training_step
from peers.sizes import FEED_FORWARD, HEADS, HIDDEN, LAYERS, LENGTH, VOCAB, draw_rows
from peers.turns import Step

# Two matrices where SwiGLU has three: as many weights.
INNER = 3 * FEED_FORWARD // 2


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.widen, self.narrow = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = _norm(x)
        heads = [part(normed).unflatten(-1, (HEADS, -1)) for part in (self.query, self.key, self.value)]
        query, key = (_norm(_turned(part, cos, sin)) for part in heads[:2])
        parts = (part.transpose(1, 2) for part in (query, key, heads[2]))
        x = x + self.output(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.relu(self.widen(_norm(x))).square())


class _Decoder(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, HIDDEN)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, vocab, bias=False)
        width = HIDDEN // HEADS
        angles = torch.outer(torch.arange(LENGTH).float(), 10_000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angles.cos().unsqueeze(1))
        self.register_buffer("sin", angles.sin().unsqueeze(1))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = _norm(self.embedding(tokens))
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = 15 * torch.tanh(self.head(_norm(x)) / 15)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def research_loop(compiled: bool = False, vocab: int = VOCAB) -> Step:
    """A step of it, with the fused AdamW."""
    torch.manual_seed(0)
    model = _Decoder(vocab)
    rows = draw_rows(vocab=vocab)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    run = torch.compile(model) if compiled else model
    return training_step(model, lambda: run(tokens, labels))
