"""The order of samples: a pure function of (seed, position), computed in constant time and memory.

Nothing here holds a shuffled list. A permutation of n numbers is a keyed Feistel network over the next power of
four, walked along its cycle until it lands below n (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains"), so that any position of any epoch is found without the positions before it.
"""

import numpy as np
from numpy.typing import NDArray

UInt = NDArray[np.uint64]

ROUNDS = 6
# Networks narrower than this reach too few of the permutations of a handful of samples.
LEAST_HALF_BITS = 4


def mix(*parts: int | UInt) -> UInt:
    """Hashes integers (or arrays of them, elementwise) to 64 bits, by the finaliser of SplitMix64."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = _finalise(state + np.uint64(0x9E3779B97F4A7C15) + np.asarray(part, dtype=np.uint64))
    return state


def permute(index: UInt, size: int, key: UInt) -> UInt:
    """Where `index` lands in the permutation of `range(size)` that `key` names.

    Args:
        index: Numbers below `size`, any shape (n,).
        size: Length of the permutation, at least 1.
        key: One key for all, shape (1,), or one for each index, shape (n,).
    """
    half = np.uint64(max(LEAST_HALF_BITS, -(-max(size - 1, 1).bit_length() // 2)))
    keys = np.broadcast_to(key, index.shape)
    result = index.astype(np.uint64)
    pending = np.arange(result.size)
    while pending.size:
        result[pending] = _feistel(result[pending], half, keys[pending])
        pending = pending[result[pending] >= size]
    return result


def _feistel(value: UInt, half: np.uint64, key: UInt) -> UInt:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (mix(key, number, right) & mask)
    return (left << half) | right


def _finalise(state: UInt) -> UInt:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
