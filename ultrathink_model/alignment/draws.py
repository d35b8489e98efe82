"""Random numbers that depend on the seed and on what they are for, never on how the run got there."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ultrathink_model.data.order import mix, permute

# What a draw is for: each purpose has its own stream.
SELF_PLAY, REWARD_ORDER, ROLLOUT, PROMPT_ORDER, PAIR_ORDER, MINIBATCHES, HEADS, SAMPLES, CRITIC, TUNING_ORDER = range(
    10
)


def make_generator(*parts: int) -> torch.Generator:
    """A generator on the CPU that is seeded by a hash of the parts: a resumed round draws what it would have drawn."""
    return torch.Generator().manual_seed(int(mix(*parts)[0]))


def shuffled(size: int, *parts: int) -> Int[Tensor, " size"]:
    """A permutation of `range(size)` that depends on the parts alone."""
    return torch.from_numpy(permute(np.arange(size, dtype=np.uint64), size, mix(*parts)).astype(np.int64))


def endless_order(first: int, count: int, size: int, *parts: int) -> list[int]:
    """Items `first` to `first + count` of an endless pass over `range(size)` that is shuffled anew in each epoch."""
    chosen: list[int] = []
    position = first
    while position < first + count:
        epoch, offset = divmod(position, size)
        part = shuffled(size, *parts, epoch)[offset : offset + first + count - position]
        chosen += part.tolist()
        position += len(part)
    return chosen
