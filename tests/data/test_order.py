import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_model.data.order import mix, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_permute_reaches_every_place_once(size, key):
    places = permute(np.arange(size, dtype=np.uint64), size, mix(key))
    assert sorted(places.tolist()) == list(range(size))


def test_permute_of_one_place_needs_no_others():
    size, key = 10**12, mix(7)
    together = permute(np.arange(100, dtype=np.uint64), size, key)
    alone = [int(permute(np.array([index], dtype=np.uint64), size, key)[0]) for index in range(100)]
    assert together.tolist() == alone


def test_permute_takes_a_key_for_each_index():
    index = np.zeros(50, dtype=np.uint64)
    keys = mix(3, np.arange(50, dtype=np.uint64))
    mixed = permute(index, 1000, keys)
    assert mixed.tolist() == [int(permute(index[:1], 1000, keys[[k]])[0]) for k in range(50)]


@pytest.mark.parametrize("size", [5, 64, 1000])
def test_permutations_of_different_keys_are_uniform_and_unrelated(size):
    keys = 4000
    first = permute(np.zeros(keys, dtype=np.uint64), size, mix(1, np.arange(keys, dtype=np.uint64)))
    counts = np.bincount(first.astype(np.int64), minlength=size)
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    # Mean size - 1 and variance 2 (size - 1) when uniform: five standard deviations above.
    assert chi_square < (size - 1) + 5 * np.sqrt(2 * (size - 1))


def test_neighbours_are_spread_over_the_whole_range():
    places = permute(np.arange(10_000, dtype=np.uint64), 10_000, mix(11)).astype(float)
    # The correlation of independent neighbours has standard deviation 0.01.
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(places, np.arange(10_000))[0, 1]) < 0.05
