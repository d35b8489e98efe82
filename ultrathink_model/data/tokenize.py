"""Tokenizing: one source's documents, encoded on all processors and written as shards, several pieces at once."""

import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pydantic import BaseModel

from ultrathink_model.config import Config
from ultrathink_model.data.card import Notes, NotesState, Sample
from ultrathink_model.data.document import Document, Medium, Split
from ultrathink_model.data.intake import SPLITS, Intake, IntakeState
from ultrathink_model.data.manifest import SourceInfo, SplitInfo
from ultrathink_model.data.media_index import MediaIndexWriter
from ultrathink_model.data.media_store import MediaWriter
from ultrathink_model.data.pack import count_rows
from ultrathink_model.data.shards import ShardWriter, WriterState
from ultrathink_model.data.sources import Ingredient
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.media.placeholders import cut_at_placeholders

logger = logging.getLogger(__name__)

# Text is encoded in batches of about this many characters: enough for all processors, little enough for memory.
BATCH_CHARACTERS = 2**22
# A killed preparation goes on from where it last took note, at most this much text before.
NOTED_CHARACTERS = 2**26
PROGRESS_SECONDS = 15.0
# They wait for the disk while the processors encode what comes next.
WRITING_THREADS = 4


class Size(BaseModel):
    """What is written of one split."""

    documents: int = 0
    tokens: int = 0
    """All tokens of the stream, those of media too."""
    bytes: int = 0
    media_tokens: int = 0
    images: int = 0
    sounds: int = 0

    def count(self, pieces: list[str], tokens: int, media: Sequence[Medium]) -> None:
        """Adds a document: its text between the media, all its tokens, and its media."""
        self.documents += 1
        self.tokens += tokens
        self.bytes += sum(len(piece.encode()) for piece in pieces)
        self.media_tokens += sum(medium.tokens for medium in media)
        self.images += sum(medium.kind == "image" for medium in media)
        self.sounds += sum(medium.kind == "audio" for medium in media)


class Reading(BaseModel):
    """Where the reading of a stream goes on, so that what came before is not read again."""

    intake: IntakeState
    notes: NotesState


class Progress(BaseModel):
    """How far the tokenizing of one source is, on disk."""

    documents: int = 0
    sizes: dict[Split, Size] = {split: Size() for split in SPLITS}
    writers: dict[Split, WriterState] = {split: WriterState() for split in SPLITS}
    reading: Reading | None = None


class Finished(BaseModel):
    """A source that is written, on disk until all are."""

    info: SourceInfo
    samples: list[Sample]


def write_source(
    config: Config,
    ingredient: Ingredient,
    tokenizer: Tokenizer,
    folder: Path,
    number: str,
    dtype: str,
    media: MediaWriter | None,
) -> Finished:
    """Writes a source's shards to `train/<number>/` and `validation/<number>/` of `folder`, as a stream.

    Where an earlier start was killed, its tokens are taken up: the documents are read again, but not encoded. A stream
    of the hub is not read again either, unless it has no `Intake.state`. Of a source that was finished nothing is.

    Raises:
        DataError: The source cannot be read, is empty, or has too many bad rows.
    """
    finished = folder / f"source_{number}.json"
    if finished.is_file():
        return Finished.model_validate_json(finished.read_bytes())
    record, hashes = folder / f"progress_{number}.json", folder / f"hashes_{number}.bin"
    done = Progress.model_validate_json(record.read_bytes()) if record.is_file() else Progress()
    intake = _open_intake(config, ingredient, folder / f"quarantine_{number}.jsonl", media, done)
    notes = Notes()
    if done.reading is not None:
        notes.go_on(done.reading.notes, hashes)
    sizes = {split: size.model_copy() for split, size in done.sizes.items()}
    bound = tokens_needed(config, ingredient)
    told, noted, count = time.monotonic(), 0, done.documents if done.reading else 0
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(WRITING_THREADS, "shards"))
        writers = {
            split: stack.enter_context(ShardWriter(folder, f"{split}/{number}", dtype, pool, state=done.writers[split]))
            for split in SPLITS
        }
        indices = _open_indices(stack, folder, number, done) if media else {}
        for batch in _batches(notes.watch(intake.documents())):
            count += len(batch)
            new = batch[max(0, done.documents - (count - len(batch))) :]
            for document, (ids, starts, pieces) in zip(new, encode_documents(tokenizer, new), strict=True):
                size = sizes[document.split]
                for start, medium in zip(starts, document.media, strict=True):
                    indices[document.split].add(size.tokens + start, medium)
                written = writers[document.split].add([*ids, tokenizer.eos_id])
                size.count(pieces, written, document.media)
            intake.train_full = count >= done.documents and sizes["train"].tokens >= bound
            noted += sum(len(document.text) for document in new)
            if noted >= NOTED_CHARACTERS:
                noted = 0
                # What the progress counts must outlast a kill.
                intake.sync()
                if media is not None:
                    media.sync()
                for index in indices.values():
                    index.sync()
                states = {split: writer.state() for split, writer in writers.items()}
                state = intake.state()
                reading = Reading(intake=state, notes=notes.save(hashes)) if state else None
                write_record(record, Progress(documents=count, sizes=sizes, writers=states, reading=reading))
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                read = sizes["train"].bytes / 1e6
                logger.info("%s: %d rows read, %.0f MB of training text", intake.name, intake.rows, read)
    info = SourceInfo(
        name=intake.name,
        licence=ingredient.source.licence,
        weight=ingredient.spec.weight,
        cap=ingredient.spec.cap,
        expert_group=ingredient.spec.expert_group,
        identity=ingredient.identity,
        rows=intake.rows,
        quarantined=intake.quarantined,
        duplicates=notes.duplicates(),
        splits={split: _split_info(config, sizes[split], writers[split], folder, split, number) for split in SPLITS},
        shards={split: writers[split].shards for split in SPLITS},
    )
    intake.sync()
    if media is not None:
        media.sync()
    done_with = Finished(info=info, samples=notes.samples)
    write_record(finished, done_with)
    record.unlink(missing_ok=True)
    hashes.unlink(missing_ok=True)
    return done_with


def _open_intake(
    config: Config, ingredient: Ingredient, quarantine: Path, media: MediaWriter | None, done: Progress
) -> Intake:
    """The reading of a source, and its bad rows, where they were when the progress was noted."""
    if quarantine.is_file():
        os.truncate(quarantine, done.reading.intake.quarantine_bytes if done.reading else 0)
    intake = Intake(ingredient.source, config.data, quarantine, media)
    logger.info("tokenizing %s", intake.name + (f" from document {done.documents + 1} on" if done.documents else ""))
    if done.reading is not None:
        intake.go_on(done.reading.intake)
        intake.train_full = done.sizes["train"].tokens >= tokens_needed(config, ingredient)
    return intake


def _split_info(config: Config, size: Size, writer: ShardWriter, folder: Path, split: Split, number: str) -> SplitInfo:
    rows = count_rows(config, folder, writer.shards, f"{split}/{number}", size.tokens)
    padding = rows * config.model.max_seq_length - size.tokens
    values = size.model_dump() | {"tokens": size.tokens - size.media_tokens}
    return SplitInfo(**values, sequences=rows, padding=padding)


def _open_indices(stack: ExitStack, folder: Path, number: str, done: Progress) -> dict[Split, MediaIndexWriter]:
    """The indices of media of both splits, cut back to what the progress counts."""
    indices = {}
    for split, size in done.sizes.items():
        indices[split] = MediaIndexWriter(folder / split / number, size.images + size.sounds)
        stack.callback(indices[split].close)
    return indices


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Document]
) -> Iterator[tuple[list[int], list[int], list[str]]]:
    """The ids of documents, with each placeholder repeated for as many tokens as its medium has.

    Yields:
        The ids, where in them each medium begins, and the pieces of text that were encoded.
    """
    pieces = [cut_at_placeholders(document.text)[0] if document.media else [document.text] for document in documents]
    encoded = iter(tokenizer.encode_batch([piece for some in pieces for piece in some]))
    media_ids = tokenizer.media_ids
    for document, some in zip(documents, pieces, strict=True):
        ids = list(next(encoded))
        starts = []
        for medium in document.media:
            starts.append(len(ids))
            ids += [media_ids[medium.kind]] * medium.tokens + next(encoded)
        yield ids, starts, some


def write_record(record: Path, values: BaseModel) -> None:
    """Writes a record of a half-built folder; a kill leaves the one before it."""
    part = record.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(values.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    part.replace(record)


def tokens_needed(config: Config, ingredient: Ingredient) -> float:
    """Training tokens after which a streaming source is read no further: its share of `data.train_samples`, its cap."""
    if not ingredient.source.streaming:
        return math.inf
    samples, cap = config.data.train_samples, ingredient.spec.cap
    share = math.inf if samples is None else math.ceil(samples * ingredient.spec.weight) * config.model.max_seq_length
    return share if cap is None else min(share, cap)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
