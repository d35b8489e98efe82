"""Mixtures: which sources there are, and which of them gives the sample at a position."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64
from numpy.typing import NDArray

from ultrathink_model.config import Config
from ultrathink_model.config.data import DataConfig, DataSource
from ultrathink_model.data.order import UInt, mix, permute
from ultrathink_model.errors import ConfigError

# Weights are kept to one part in ten thousand: each block of this many positions holds its exact share of every source.
BLOCK = 10_000


def list_sources(data: DataConfig) -> list[DataSource]:
    """The sources of `data.mix_datasets`, or the one of `data.dataset`, with weights that sum to 1.

    Raises:
        ConfigError: The mixture is not of the form "a:0.3,b:0.7", names a source twice, or has a weight too small.
    """
    if data.mix_datasets is None:
        return [DataSource(dataset=data.dataset, weight=1.0, cap=None, expert_group=None)]
    mixture = data.mix_datasets
    sources = _parse_mixture(mixture) if isinstance(mixture, str) else mixture
    if not sources:
        raise ConfigError('data.mix_datasets is empty; name sources as in "wikitext:0.3,openwebtext:0.7", or set null.')
    names = [source.dataset for source in sources]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ConfigError(f"data.mix_datasets names {', '.join(doubles)} more than once; add up its weights.")
    total = sum(source.weight for source in sources)
    for source in sources:
        if len(sources) > 1 and source.weight / total < 1 / BLOCK:
            raise ConfigError(
                f"data.mix_datasets: {source.dataset} has weight {source.weight:g} of {total:g}, under the least share "
                f"1/{BLOCK}; raise it or leave the source out."
            )
    return [source.model_copy(update={"weight": source.weight / total}) for source in sources]


def _parse_mixture(text: str) -> list[DataSource]:
    sources = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        # A Windows path or a hub id may hold a colon itself, so the weight is what follows the last one.
        name, _, number = part.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = float("nan")
        if not name.strip() or not 0 < weight < float("inf"):
            raise ConfigError(
                f'data.mix_datasets: {part!r} is not NAME:WEIGHT with a weight above 0, as in "wikitext:0.3,sotu:0.7".'
            )
        sources.append(DataSource(dataset=name.strip(), weight=weight, cap=None, expert_group=None))
    return sources


def apportion(weights: Sequence[float], seats: int) -> list[int]:
    """Divides `seats` among weights that sum to 1, each at least one seat, by largest remainder."""
    exact = [weight * seats for weight in weights]
    counts = [max(int(share), 1) for share in exact]
    by_need = sorted(range(len(weights)), key=lambda number: counts[number] - exact[number])
    for number in range(seats - sum(counts)):
        counts[by_need[number % len(by_need)]] += 1
    while sum(counts) > seats:
        counts[counts.index(max(counts))] -= 1
    return counts


class SampleOrder:
    """Where each global position's sample comes from: its source, and the sequence within the source.

    Positions fall into blocks in which source k has exactly nₖ places, shuffled by (seed, block). The j-th place of
    source k in block b is therefore that source's sample number b·nₖ + j, and no block needs the ones before it. Samples
    of a source are numbered through its epochs, each a new permutation by (seed, source, epoch), so that a source
    repeats nothing before it has given everything. With `train_samples`, a source uses only its share of that number,
    and with a cap no more than that: a random part of its sequences (the first ones would be one period or one author),
    the same in every epoch, so that an epoch is a pass over it.

    Args:
        sequences: Training sequences of each source, at least 1.
        weights: Shares of the sources, which sum to 1.
        config: `training.seed` and `data.train_samples`.
        caps: Most sequences of each source; None bounds none of them.
    """

    def __init__(
        self,
        sequences: Sequence[int],
        weights: Sequence[float],
        config: Config,
        caps: Sequence[int | None] | None = None,
    ) -> None:
        self._seed = config.training.seed
        self._sequences = list(sequences)
        self._counts = tuple(apportion(weights, BLOCK))
        bound = config.data.train_samples
        self._used = [
            min(
                total,
                total if cap is None else cap,
                total if bound is None else max(1, round(bound * weight)),
            )
            for total, weight, cap in zip(sequences, weights, caps or [None] * len(sequences), strict=True)
        ]
        if bound is None:
            self.epoch_length = sum(self._used)
        else:
            self.epoch_length = bound if len(weights) > 1 else self._used[0]

    def locate(self, positions: UInt64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """The source and the sequence within it of each global position."""
        source, number = self._count(positions)
        sequence = np.empty(positions.shape, dtype=np.int64)
        for index in np.unique(source):
            chosen = source == index
            sequence[chosen] = self._sequence_of(int(index), number[chosen])
        return source, sequence

    def _count(self, positions: UInt) -> tuple[NDArray[np.int64], UInt]:
        """The source of each position, and the number of its samples before that position."""
        if len(self._sequences) == 1:
            return np.zeros(positions.shape, dtype=np.int64), positions
        source = np.empty(positions.shape, dtype=np.int64)
        number = np.empty(positions.shape, dtype=np.uint64)
        counts = np.asarray(self._counts, dtype=np.uint64)
        blocks = positions // np.uint64(BLOCK)
        for block in np.unique(blocks):
            chosen = blocks == block
            sources, ranks = _lay_out_block(self._seed, int(block), self._counts)
            places = positions[chosen] - block * np.uint64(BLOCK)
            source[chosen] = sources[places]
            number[chosen] = block * counts[sources[places]] + ranks[places]
        return source, number

    def _sequence_of(self, source: int, number: UInt) -> NDArray[np.int64]:
        total, used = self._sequences[source], self._used[source]
        epoch, place = number // np.uint64(used), number % np.uint64(used)
        place = permute(place, used, mix(self._seed, 2, source, epoch))
        if used < total:
            place = permute(place, total, mix(self._seed, 3, source))
        return place.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _lay_out_block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[NDArray[np.int64], UInt]:
    """The source of each place of a block, and the place's rank among the places of its source."""
    shuffled = permute(np.arange(BLOCK, dtype=np.uint64), BLOCK, mix(seed, 1, block))
    sources = np.searchsorted(np.cumsum(counts), shuffled, side="right")
    ranks = np.empty(BLOCK, dtype=np.uint64)
    for index, count in enumerate(counts):
        ranks[sources == index] = np.arange(count, dtype=np.uint64)
    return sources, ranks
