"""The loaders: batches of packed sequences in an order that no number of ranks or workers changes."""

import functools
import logging
import math
import signal
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ultrathink_model.config import Config
from ultrathink_model.config.model import MoEConfig
from ultrathink_model.data.batch import NO_GROUP, Batch, make_batch
from ultrathink_model.data.manifest import MEDIA_FOLDER, DataManifest, SourceInfo, Split, media_settings
from ultrathink_model.data.media_batch import make_media_batch
from ultrathink_model.data.media_index import MediaIndex
from ultrathink_model.data.media_store import MediaStore
from ultrathink_model.data.mixture import SampleOrder
from ultrathink_model.data.pack import BestFitRows, Row, Segment, StreamRows, padding_row, read_row
from ultrathink_model.data.shards import TokenStream
from ultrathink_model.errors import ConfigError

logger = logging.getLogger(__name__)

PREFETCHED_STEPS = 4


def global_batch_size(config: Config, world_size: int) -> int:
    """Sequences in one optimizer step over all ranks."""
    return accumulation_steps(config, world_size) * config.training.batch_size * world_size


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-steps in one optimizer step: `training.global_batch_size` over what all ranks take in one micro-step.

    Raises:
        ConfigError: `training.global_batch_size` is not a multiple of `training.batch_size` times the ranks.
    """
    training = config.training
    if training.global_batch_size is None:
        return training.gradient_accumulation_steps
    micro_step = training.batch_size * world_size
    steps, rest = divmod(training.global_batch_size, micro_step)
    if rest:
        below = steps * micro_step
        nearest = " or ".join(str(size) for size in (below, below + micro_step) if size)
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of training.batch_size="
            f"{training.batch_size} × {world_size} ranks = {micro_step}: {steps} micro-steps would leave {rest} "
            f"sequences over; set it to {nearest}, or change training.batch_size."
        )
    return steps


class SplitReader:
    """The rows of one split of all sources, with their expert groups."""

    def __init__(self, manifest: DataManifest, split: Split) -> None:
        self._manifest, self._split = manifest, split
        self.sequences = [source.splits[split].sequences for source in manifest.sources]
        self._groups = [expert_group_index(source) for source in manifest.sources]

    def batch(self, places: list[tuple[int, int]]) -> Batch:
        """The rows at (source, sequence); a source of -1 stands for a row that predicts nothing."""
        rows = [self._row(source, sequence) for source, sequence in places]
        return self.stack(rows, [self._groups[source] if source >= 0 else NO_GROUP for source, _ in places])

    def stack(self, rows: list[Row], groups: list[int]) -> Batch:
        """Rows of any one length with their images and sounds; `groups` names each row's expert group, -1 for none."""
        info, media = self._manifest.media, None
        if info is not None:
            media = make_media_batch([row.media for row in rows], len(rows[0].input_ids), self._store, info)
        return make_batch(rows, groups, media)

    def read(self, source: int, segments: list[Segment], length: int) -> Row:
        """A row of some stretches of a source's stream."""
        manifest = self._manifest
        stream, _, index = self._streams[source]
        return read_row(stream, segments, length, manifest.eos_id, manifest.pad_id, index)

    def _row(self, source: int, sequence: int) -> Row:
        manifest = self._manifest
        if source < 0:
            return padding_row(manifest.sequence_length, manifest.pad_id)
        return self.read(source, self._streams[source][1][sequence], manifest.sequence_length)

    @functools.cached_property
    def _store(self) -> MediaStore:
        manifest = self._manifest
        assert manifest.media is not None, "the caller has looked"
        return MediaStore(manifest.path / MEDIA_FOLDER, manifest.media)

    @functools.cached_property
    def _streams(self) -> list[tuple[TokenStream, StreamRows | BestFitRows, MediaIndex | None]]:
        # Opened at the first row: each loader process then maps the files for itself.
        manifest = self._manifest
        opened: list[tuple[TokenStream, StreamRows | BestFitRows, MediaIndex | None]] = []
        for source in manifest.sources:
            shards = source.shards[self._split]
            folder = (manifest.path / shards[0].tokens_file).parent
            stream = TokenStream(manifest.path, shards, manifest.token_dtype)
            by_stream = manifest.packing == "stream"
            rows = StreamRows(len(stream), manifest.sequence_length) if by_stream else BestFitRows(folder)
            opened.append((stream, rows, MediaIndex(folder) if manifest.media else None))
        return opened


def expert_group_index(source: SourceInfo) -> int:
    """The number of the source's expert group in the order of the groups' ranges, -1 for none."""
    return NO_GROUP if source.expert_group is None else list(MoEConfig().group_sizes).index(source.expert_group)


class TrainLoader:
    """Endless optimizer steps for one rank; each is the list of the rank's micro-batches.

    Step s takes the global positions [s·G, (s+1)·G), G being the global batch, and what stands at a position depends
    on it and on `training.seed` alone. Starting at any step costs the same. Epochs follow each other without a gap, so
    a step may hold the end of one and the beginning of the next.

    Args:
        manifest: Prepared data.
        config: `training.batch_size` and its fellows shape the steps; `data.num_workers` processes read ahead.
        rank: This process.
        world_size: Processes that share each step.
        first_step: Step to begin with, counted from 0.

    Raises:
        ConfigError: The global batch does not divide; the manifest was prepared for another sequence length or other media.
    """

    def __init__(
        self, manifest: DataManifest, config: Config, *, rank: int = 0, world_size: int = 1, first_step: int = 0
    ) -> None:
        _check_prepared_for(manifest, config)
        self._first_step = first_step
        self._workers = config.data.num_workers
        self._steps = _Steps(manifest, config, rank, world_size)
        self.epoch_sequences = self._steps.order.epoch_length
        together = global_batch_size(config, world_size)
        self.steps_per_epoch = -(-self.epoch_sequences // together)
        logger.info(
            "an epoch is %d of %d training sequences: %d steps of %d",
            self.epoch_sequences,
            manifest.splits["train"].sequences,
            self.steps_per_epoch,
            together,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        return self.steps_from(self._first_step)

    def steps_from(self, first_step: int) -> Iterator[list[Batch]]:
        """The steps from any one on, counted from 0."""
        if self._workers == 0:
            return (self._steps[step] for step in count(first_step))
        return iter(
            DataLoader(
                self._steps,
                batch_size=None,
                sampler=_StepsFrom(first_step),
                num_workers=self._workers,
                prefetch_factor=PREFETCHED_STEPS,
                pin_memory=torch.cuda.is_available(),
                # Without one of its own it would draw the workers' seed from the run's generator.
                generator=torch.Generator(),
                worker_init_fn=_leave_interrupts_to_the_trainer,
            )
        )


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    # A terminal sends Ctrl-C to every process of the group; the trainer saves first, and its workers must outlive that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Steps(Dataset[list[Batch]]):
    """One rank's micro-batches of any step, found from the step's number alone."""

    def __init__(self, manifest: DataManifest, config: Config, rank: int, world_size: int) -> None:
        self._reader = SplitReader(manifest, "train")
        # A cap counts tokens; what a row holds of them is the sequence length, but for the last row.
        caps = [source.cap and max(1, source.cap // manifest.sequence_length) for source in manifest.sources]
        weights = [source.weight for source in manifest.sources]
        self.order = SampleOrder(self._reader.sequences, weights, config, caps)
        self._micro_batch = config.training.batch_size
        self._accumulation = accumulation_steps(config, world_size)
        self._rank, self._world_size = rank, world_size

    def __getitem__(self, step: int) -> list[Batch]:
        shape = (self._accumulation, self._world_size, self._micro_batch)
        first = step * int(np.prod(shape))
        positions = np.arange(first, first + int(np.prod(shape)), dtype=np.uint64).reshape(shape)[:, self._rank]
        source, sequence = self.order.locate(positions.ravel())
        places = list(zip(source.tolist(), sequence.tolist(), strict=True))
        size = self._micro_batch
        return [self._reader.batch(places[start : start + size]) for start in range(0, len(places), size)]


class _StepsFrom(Sampler[int]):
    """The endless numbers of the steps."""

    def __init__(self, first_step: int) -> None:
        self._first_step = first_step

    def __iter__(self) -> Iterator[int]:
        return count(self._first_step)


class ValidationLoader:
    """One pass over the validation split: every token predicted once, over all ranks together.

    All ranks yield the same number of batches, since a sharded model's forward needs every rank: the last rows are
    spread over the ranks, and one that gets none yields a row that predicts nothing.

    Args:
        manifest: Prepared data.
        config: `evaluation.batch_size` is the sequences of a batch.
        rank: This process.
        world_size: Processes that share the pass.
        max_sequences: Most sequences, taken evenly over the whole split whatever the seed; None takes all.
    """

    def __init__(
        self,
        manifest: DataManifest,
        config: Config,
        *,
        rank: int = 0,
        world_size: int = 1,
        max_sequences: int | None = None,
    ) -> None:
        _check_prepared_for(manifest, config)
        self._reader = SplitReader(manifest, "validation")
        self._rank, self._world_size = rank, world_size
        self._batch_size = config.evaluation.batch_size
        total = sum(self._reader.sequences)
        self.num_sequences = total if max_sequences is None else min(total, max_sequences)

    def __len__(self) -> int:
        return math.ceil(self.num_sequences / (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            yield self._reader.batch(self._places(number))

    def _places(self, number: int) -> list[tuple[int, int]]:
        together = self._batch_size * self._world_size
        mine = np.array_split(
            np.arange(number * together, min((number + 1) * together, self.num_sequences)), self._world_size
        )[self._rank]
        starts = np.cumsum([0, *self._reader.sequences])
        rows = mine * int(starts[-1]) // self.num_sequences
        source = np.searchsorted(starts, rows, side="right") - 1
        return list(zip(source.tolist(), (rows - starts[source]).tolist(), strict=True)) or [(-1, 0)]


def _check_prepared_for(manifest: DataManifest, config: Config) -> None:
    if manifest.sequence_length != config.model.max_seq_length:
        raise ConfigError(
            f"model.max_seq_length={config.model.max_seq_length}, but the data in {manifest.path} was prepared for "
            f"{manifest.sequence_length}; prepare it again with this config."
        )
    if config.advanced.enable_multimodal != (manifest.media is not None):
        raise ConfigError(
            f"advanced.enable_multimodal={config.advanced.enable_multimodal}, but the data in {manifest.path} was "
            f"prepared {'with' if manifest.media else 'without'} it; prepare it again with this config."
        )
    if manifest.media is not None:
        for key, value in media_settings(config.multimodal).items():
            if getattr(manifest.media, key) != value:
                raise ConfigError(
                    f"multimodal.{key}={value}, but the data in {manifest.path} was prepared with "
                    f"{getattr(manifest.media, key)}; prepare it again with this config."
                )
