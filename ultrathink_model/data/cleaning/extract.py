"""Taking documents out of the sources into files that cleaning tasks share out."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from ultrathink_model.config import Config
from ultrathink_model.data.cleaning.steps import task_file
from ultrathink_model.data.intake import Intake
from ultrathink_model.data.sources import Ingredient
from ultrathink_model.data.tokenize import tokens_needed

RECORD_NAME = "extracted.json"
# A task's file has at least this much text, and at least the given share of all text before it, so that the number of
# tasks grows with the logarithm of the corpus once it is large.
TASK_CHARACTERS = 2**22
TASK_SHARE = 1 / 256
# A token of a usual tokenizer is about 4 characters; a stream is read further, since cleaning removes some of it.
STREAM_CHARACTERS_PER_TOKEN = 8


class ExtractedSource(BaseModel):
    """A source whose documents lie in the files of tasks `first_task` to before `last_task`."""

    rows: int
    quarantined: int
    first_task: int
    last_task: int

    @property
    def tasks(self) -> range:
        """The tasks that hold its documents."""
        return range(self.first_task, self.last_task)


class Extracted(BaseModel):
    """All sources of a mixture, extracted."""

    sources: list[ExtractedSource]


def extract(config: Config, ingredients: list[Ingredient], folder: Path, quarantine: Path) -> Extracted:
    """Writes the documents of all sources to `folder`, or finds them there whole from an earlier start.

    Raises:
        DataError: A source cannot be read, is empty, or has too many bad rows.
    """
    record = folder / RECORD_NAME
    if record.is_file():
        return Extracted.model_validate_json(record.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    quarantine.unlink(missing_ok=True)
    sources: list[ExtractedSource] = []
    characters = 0
    for ingredient in ingredients:
        intake = Intake(ingredient.source, config.data, quarantine_file=quarantine)
        first = sources[-1].last_task if sources else 0
        bound = tokens_needed(config, ingredient) * STREAM_CHARACTERS_PER_TOKEN
        count, characters = _write_tasks(intake, bound, folder, first, characters)
        sources.append(
            ExtractedSource(rows=intake.rows, quarantined=intake.quarantined, first_task=first, last_task=first + count)
        )
    extracted = Extracted(sources=sources)
    part = record.with_suffix(".part")
    part.write_text(extracted.model_dump_json(), encoding="utf-8")
    part.replace(record)
    return extracted


def _write_tasks(intake: Intake, bound: float, folder: Path, first: int, characters: int) -> tuple[int, int]:
    """Writes one source's documents; says how many files they took, and the characters of all sources so far."""
    lines = _lines(intake, bound)
    count = 0
    line = next(lines, None)
    while line is not None:
        limit = max(TASK_CHARACTERS, math.ceil(characters * TASK_SHARE))
        size = 0
        with task_file(folder, first + count).open("w", encoding="utf-8") as file:
            while line is not None and size < limit:
                file.write(line)
                size += len(line)
                line = next(lines, None)
        characters += size
        count += 1
    return count, characters


def _lines(intake: Intake, bound: float) -> Iterator[str]:
    read = 0
    for document in intake.documents():
        read += len(document.text) if document.split == "train" else 0
        intake.train_full = read >= bound
        values = {"text": document.text, "file": document.file, "row": document.row, "split": document.split}
        yield json.dumps(values, ensure_ascii=False) + "\n"
