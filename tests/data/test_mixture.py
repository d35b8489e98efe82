import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_model.config import make_config
from ultrathink_model.data.mixture import BLOCK, SampleOrder, apportion, list_sources
from ultrathink_model.errors import ConfigError


def order(sequences, weights, **data):
    return SampleOrder(sequences, weights, make_config({"data": data}))


def locate(samples, start, stop):
    source, sequence = samples.locate(np.arange(start, stop, dtype=np.uint64))
    return list(zip(source.tolist(), sequence.tolist(), strict=True))


def test_an_epoch_of_one_source_holds_each_sequence_once_and_the_next_is_shuffled_anew():
    samples = order([97], [1.0])
    first, second = locate(samples, 0, 97), locate(samples, 97, 194)
    assert sorted(first) == sorted(second) == [(0, index) for index in range(97)]
    assert first != second
    assert first != sorted(first)


@given(bound=st.integers(1, 150))
def test_train_samples_keep_the_same_random_part_in_every_epoch(bound):
    samples = order([100], [1.0], train_samples=bound)
    used = min(bound, 100)
    assert samples.epoch_length == used
    epochs = [locate(samples, epoch * used, (epoch + 1) * used) for epoch in range(3)]
    assert len(set(epochs[0])) == used
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


def test_train_samples_are_not_the_first_ones():
    chosen = [index for _, index in locate(order([1000], [1.0], train_samples=100), 0, 100)]
    # The mean of 100 of 0 … 999 without replacement has standard deviation 27.4 about 499.5.
    assert abs(np.mean(chosen) - 499.5) < 5 * 27.4


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=4),
    parts=st.lists(st.integers(1, 50), min_size=4, max_size=4),
)
def test_each_block_honours_the_weights_and_no_source_repeats_before_it_is_exhausted(sizes, parts):
    weights = [part / sum(parts[: len(sizes)]) for part in parts[: len(sizes)]]
    places = locate(order(sizes, weights), 0, BLOCK)
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        mine = [sequence for source, sequence in places if source == number]
        assert abs(len(mine) - weight * BLOCK) <= len(sizes)
        epochs = [mine[start : start + size] for start in range(0, len(mine), size)]
        assert all(len(set(epoch)) == size for epoch in epochs[:-1])


def test_the_samples_at_a_position_need_no_earlier_position():
    samples = order([30, 70], [0.3, 0.7])
    together = locate(samples, 0, 25_000)
    assert locate(samples, 24_990, 25_000) == together[-10:]


def test_a_mixture_is_mixed_at_once():
    sources = [source for source, _ in locate(order([1000, 1000], [0.3, 0.7]), 0, 1000)]
    # The share of 1,000 draws has standard deviation 0.0145.
    assert abs(np.mean(sources) - 0.7) < 5 * 0.0145


def test_seeds_give_different_orders():
    first = SampleOrder([50], [1.0], make_config({"training": {"seed": 1}}))
    second = SampleOrder([50], [1.0], make_config({"training": {"seed": 2}}))
    assert locate(first, 0, 50) != locate(second, 0, 50)


@given(parts=st.lists(st.floats(0.01, 100), min_size=1, max_size=9), seats=st.integers(9, 1000))
def test_apportion_gives_every_seat_and_everyone_one(parts, seats):
    counts = apportion([part / sum(parts) for part in parts], seats)
    assert sum(counts) == seats
    assert min(counts) >= 1


def test_a_mixture_can_be_a_string_or_a_list():
    text = list_sources(make_config({"data": {"mix_datasets": "sotu:3, c:/texts/*.md:1"}}).data)
    assert [(source.dataset, source.weight) for source in text] == [("sotu", 0.75), ("c:/texts/*.md", 0.25)]
    values = [{"dataset": "sotu", "weight": 1, "expert_group": "skill"}, {"dataset": "dummy", "weight": 3}]
    listed = list_sources(make_config({"data": {"mix_datasets": values}}).data)
    assert [(source.dataset, source.weight, source.expert_group) for source in listed] == [
        ("sotu", 0.25, "skill"),
        ("dummy", 0.75, None),
    ]


@pytest.mark.parametrize(
    "mixture", ["sotu", "sotu:", ":1", "sotu:-1", "sotu:nan", "sotu:inf", "", "sotu:1,sotu:2", "a:1,b:1e-9"]
)
def test_a_mixture_that_cannot_be_read_is_refused(mixture):
    with pytest.raises(ConfigError, match=r"data\.mix_datasets"):
        list_sources(make_config({"data": {"mix_datasets": mixture}}).data)


def test_a_cap_bounds_what_a_source_gives_and_keeps_the_same_random_part():
    config = make_config({"data": {}})
    samples = SampleOrder([100, 50], [0.5, 0.5], config, caps=[10, None])
    assert samples.epoch_length == 60
    places = locate(samples, 0, 400)
    capped = [sequence for source, sequence in places if source == 0]
    assert len(set(capped)) == 10
    assert max(capped) > 10
    assert len({sequence for source, sequence in places if source == 1}) == 50
