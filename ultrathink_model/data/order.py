"""The order of samples: a pure function of (seed, position), computed in constant time and memory.

Nothing here holds a shuffled list. A permutation of n numbers is a keyed Feistel network over the next power of
two, walked along its cycle until it lands below n (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains"), so that any position of any epoch is found without the positions before it.
"""

import numpy as np
from jaxtyping import UInt64
from numpy.typing import NDArray

UInt = NDArray[np.uint64]

ROUNDS = 6
# A network of fewer bits reaches too few of the permutations of a handful of samples.
LEAST_BITS = 6

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def mix(*parts: int | UInt) -> UInt:
    """Hashes integers, or arrays of them elementwise, to 64 bits: SplitMix64's finaliser, part after part."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _finalise(state + GOLDEN + np.asarray(part, dtype=np.uint64))
    return state


def permute(index: UInt64[np.ndarray, " n"], size: int, key: UInt64[np.ndarray, " keys"]) -> UInt64[np.ndarray, " n"]:
    """Where `index` lands in the permutation of `range(size)` that `key` names.

    Args:
        index: Numbers below `size`.
        size: Length of the permutation, at least 1.
        key: One key for all, or one for each index.
    """
    if size == 1:
        return np.zeros_like(index)
    bits = max(LEAST_BITS, (size - 1).bit_length())
    keys = np.broadcast_to(key, index.shape)
    result = _feistel(index, bits, keys)
    # At most every second number of the network lies beyond `size`, but for the smallest sizes.
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = _feistel(result[outside], bits, keys[outside])
    return result


def _feistel(value: UInt, bits: int, key: UInt) -> UInt:
    """One pass of a network whose halves differ by a bit where `bits` is odd."""
    widths = (np.uint64(bits // 2), np.uint64(bits - bits // 2))
    masks = tuple((np.uint64(1) << width) - np.uint64(1) for width in widths)
    halves = [value >> widths[1], value & masks[1]]
    for number in range(ROUNDS):
        side = number % 2
        key = key + GOLDEN
        halves[side] = halves[side] ^ (_finalise(key ^ halves[1 - side]) & masks[side])
    return (halves[0] << widths[1]) | halves[1]


def _finalise(state: UInt) -> UInt:
    state = (state ^ (state >> SHIFTS[0])) * MULTIPLIERS[0]
    state = (state ^ (state >> SHIFTS[1])) * MULTIPLIERS[1]
    return state ^ (state >> SHIFTS[2])
