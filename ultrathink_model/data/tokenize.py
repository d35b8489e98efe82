"""Tokenizing: one source's documents, encoded on all processors and written as shards."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ultrathink_model.config import Config
from ultrathink_model.data.intake import Intake
from ultrathink_model.data.manifest import SourceInfo, Split, SplitInfo
from ultrathink_model.data.pack import count_sequences
from ultrathink_model.data.shards import ShardWriter
from ultrathink_model.data.sources import Ingredient
from ultrathink_model.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "validation")
QUARANTINE_NAME = "quarantine.jsonl"
# Text is encoded in batches of about this many characters: enough for all processors, little enough for memory.
BATCH_CHARACTERS = 2**22
PROGRESS_SECONDS = 15.0


def write_source(
    config: Config, ingredient: Ingredient, tokenizer: Tokenizer, folder: Path, number: str, dtype: str
) -> SourceInfo:
    """Writes a source's shards to `train/<number>/` and `validation/<number>/` of `folder`, as a stream.

    Raises:
        DataError: The source cannot be read, is empty, or has too many bad rows.
    """
    source = ingredient.source
    logger.info("tokenizing %s", source.name)
    intake = Intake(source, config.data, quarantine_file=folder / QUARANTINE_NAME)
    bound = _tokens_needed(config, ingredient)
    told = time.monotonic()
    sizes: dict[Split, _Size] = {split: _Size() for split in SPLITS}
    with (
        ShardWriter(folder, f"train/{number}", dtype) as train,
        ShardWriter(folder, f"validation/{number}", dtype) as validation,
    ):
        writers: dict[Split, ShardWriter] = {"train": train, "validation": validation}
        for batch in _batches(intake.documents()):
            for (split, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
                writers[split].add([*ids, tokenizer.eos_id])
                sizes[split].add(text, len(ids) + 1)
            intake.train_full = sizes["train"].tokens >= bound
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                logger.info(
                    "%s: %d rows read, %.0f MB of training text", source.name, intake.rows, sizes["train"].bytes / 1e6
                )
    if intake.quarantined:
        logger.warning("%s: %d of %d rows are in %s", source.name, intake.quarantined, intake.rows, QUARANTINE_NAME)
    return SourceInfo(
        name=source.name,
        licence=source.licence,
        weight=ingredient.spec.weight,
        expert_group=ingredient.spec.expert_group,
        identity=ingredient.identity,
        rows=intake.rows,
        quarantined=intake.quarantined,
        splits={split: sizes[split].info(config.model.max_seq_length) for split in SPLITS},
        shards={split: writers[split].shards for split in SPLITS},
    )


@dataclass
class _Size:
    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, text: str, tokens: int) -> None:
        self.documents += 1
        self.tokens += tokens
        self.bytes += len(text.encode())

    def info(self, sequence_length: int) -> SplitInfo:
        sequences = count_sequences(self.tokens, sequence_length)
        return SplitInfo(documents=self.documents, tokens=self.tokens, bytes=self.bytes, sequences=sequences)


def _tokens_needed(config: Config, ingredient: Ingredient) -> float:
    """Training tokens after which a streaming source is read no further: its share of `data.train_samples`."""
    samples = config.data.train_samples
    if not ingredient.source.streaming or samples is None:
        return math.inf
    return math.ceil(samples * ingredient.spec.weight) * config.model.max_seq_length


def _batches(documents: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    batch: list[tuple[Split, str]] = []
    characters = 0
    for split, text in documents:
        batch.append((split, text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
