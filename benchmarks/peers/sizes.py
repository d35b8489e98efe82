"""The size that all contenders share: a decoder of 6.8 M weights, output projection apart from the embedding."""

import torch
from torch import Tensor

from ultrathink_model.config import Config, make_config

HIDDEN, LAYERS, HEADS, FEED_FORWARD, VOCAB = 256, 6, 4, 688, 4096
BATCH, LENGTH = 8, 256
LEARNING_RATE, CLIP = 3e-4, 1.0


def our_config(*overrides: str, vocab: int = VOCAB) -> Config:
    """The same model and step as a config of ours."""
    values = {
        "model": {
            "vocab_size": vocab,
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "intermediate_size": FEED_FORWARD,
            "max_seq_length": LENGTH,
            "tie_embeddings": False,
        },
        "training": {"batch_size": BATCH, "learning_rate": LEARNING_RATE, "gradient_clipping": CLIP},
    }
    return make_config(values, list(overrides))


def draw_rows(batch: int = BATCH, length: int = LENGTH, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """Random tokens, one more than a row is long."""
    return torch.randint(0, vocab, (batch, length + 1), generator=torch.Generator().manual_seed(seed))


def step_operations(vocab: int = VOCAB) -> int:
    """Operations of the matrix products of one step, forward and backward; attention's upper triangle is left out."""
    matrices = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * FEED_FORWARD) + HIDDEN * vocab
    attention = LAYERS * HIDDEN * LENGTH  # two products over half the positions on average
    return 6 * BATCH * LENGTH * (matrices + attention)
