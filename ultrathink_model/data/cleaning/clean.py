"""Cleaning a mixture: its sources extracted, run through the stages, and read again as clean sources."""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ultrathink_model.config import Config
from ultrathink_model.data.cleaning.decontamination import read_evaluation_set, write_index
from ultrathink_model.data.cleaning.executor import open_executor, run_tasks
from ultrathink_model.data.cleaning.extract import ExtractedSource, extract
from ultrathink_model.data.cleaning.stages import Plan, plan_stages
from ultrathink_model.data.cleaning.steps import known_languages, task_file
from ultrathink_model.data.document import Row, Split
from ultrathink_model.data.intake import SPLITS
from ultrathink_model.data.manifest import CleaningPart
from ultrathink_model.data.sources import Ingredient, Source
from ultrathink_model.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

HELD_OUT = "validation"
# What datatrove counts of any step and says nothing of what it did.
USUAL_COUNTS = {"total", "forwarded", "dropped", "doc_len", "train", "validation"}


class CleanSource:
    """The cleaned documents of one source, in the source's order, with the splits that they had in it."""

    streaming = False
    has_validation = True
    folder = None

    def __init__(self, source: Source, extracted: ExtractedSource, folder: Path) -> None:
        self.name, self.licence = source.name, source.licence
        self.extracted = extracted
        self._source, self._folder = source, folder

    def identity(self) -> dict[str, object]:
        """That of the source before cleaning."""
        return self._source.identity()

    def rows(self, split: Split) -> Iterator[Row]:
        """The cleaned documents of a split."""
        for task in self.extracted.tasks:
            with task_file(self._folder, task).open(encoding="utf-8") as lines:
                for line in lines:
                    values = json.loads(line)
                    if values["split"] == split:
                        yield Row(values["file"], values["row"], values["text"])


def clean(
    config: Config, ingredients: list[Ingredient], folder: Path
) -> tuple[list[Ingredient], list[CleaningPart], list[ExtractedSource]]:
    """Cleans the sources of a mixture together: a document that two of them hold is kept once.

    Works in `folder/cleaning`, from where a killed preparation goes on, and leaves `folder/quarantine_cleaning.jsonl` and
    `folder/removed.jsonl`. What comes out depends neither on the executor nor on its workers.

    Returns:
        The clean sources, what each part did, and what was taken out of the sources before.

    Raises:
        DataError: A source cannot be read, or nothing is left of it.
        ConfigError: A language is not known.
        DependencyError: The executor is not there.
    """
    _check_languages(config.cleaning.languages)
    work = (folder / "cleaning").resolve()
    logger.info("cleaning: taking the documents out of %s", ", ".join(part.source.name for part in ingredients))
    extracted = extract(config, ingredients, work / "documents", folder / "quarantine_cleaning.jsonl")
    tasks = extracted.sources[-1].last_task
    _write_indices(config, work, tasks)
    plan = plan_stages(config.cleaning, work)
    counts: dict[str, Counter[str]] = {}
    with open_executor(config.data):
        for stage in plan.stages:
            number = stage.tasks or tasks
            logger.info("cleaning: %s, %d tasks, data.executor=%s", stage.name, number, config.data.executor)
            records = work / "records" / stage.name
            counts |= run_tasks(config.data, stage.steps, number, records, light=stage.light)
    parts = _describe(plan, counts)
    _collect_removed(plan, work, tasks, folder / "removed.jsonl")
    cleaned = [
        replace(ingredient, source=CleanSource(ingredient.source, source, plan.result))
        for ingredient, source in zip(ingredients, extracted.sources, strict=True)
    ]
    for ingredient in cleaned:
        _require_documents(ingredient.source, parts)
    return cleaned, parts, extracted.sources


def cleaning_identity(config: Config) -> dict[str, object]:
    """What the fingerprint covers of cleaning: its settings, and the content of the evaluation sets."""
    values = config.cleaning.model_dump(mode="json")
    for name in config.cleaning.decontaminate:
        if name != HELD_OUT:
            digest = hashlib.sha256()
            for text in read_evaluation_set(name):
                digest.update(hashlib.sha256(text.encode()).digest())
            values[f"decontaminate {name}"] = digest.hexdigest()
    return values


def _check_languages(languages: list[str]) -> None:
    unknown = set(languages) - known_languages() if languages else set()
    if unknown:
        raise ConfigError(
            f"cleaning.languages={languages} names {', '.join(sorted(unknown))}, which cannot be told; take ISO 639-1 "
            f"codes among {' '.join(sorted(known_languages()))}."
        )


def _write_indices(config: Config, work: Path, tasks: int) -> None:
    for number, name in enumerate(config.cleaning.decontaminate):
        texts = _held_out(work / "documents", tasks) if name == HELD_OUT else read_evaluation_set(name)
        label = name if name == HELD_OUT else f"{number:02d}_{Path(name).name.replace('*', '_')}"
        write_index(label, texts, config.cleaning.decontaminate_ngram, work / "ngrams")


def _held_out(folder: Path, tasks: int) -> Iterator[str]:
    for task in range(tasks):
        with task_file(folder, task).open(encoding="utf-8") as lines:
            for values in map(json.loads, lines):
                if values["split"] == "validation":
                    yield values["text"]


def _describe(plan: Plan, counts: dict[str, Counter[str]]) -> list[CleaningPart]:
    parts = []
    for step, name in plan.parts.items():
        step_counts = counts[step.strip()]
        kept = {
            label.removeprefix("dropped_"): count
            for label, count in sorted(step_counts.items())
            if label not in USUAL_COUNTS and not label.startswith("contaminated_") and count
        }
        part = CleaningPart(
            name=name, documents=step_counts["total"], removed=step_counts["dropped"], counts=dict(kept)
        )
        logger.info("cleaning: %s: %d of %d documents removed %s", name, part.removed, part.documents, kept or "")
        parts.append(part)
    return parts


def _collect_removed(plan: Plan, work: Path, tasks: int, target: Path) -> None:
    with target.open("w", encoding="utf-8") as file:
        for name, task in itertools.product(plan.parts.values(), range(tasks)):
            removed = task_file(work / "removed" / name, task)
            if removed.is_file():
                file.write(removed.read_text(encoding="utf-8"))


def _require_documents(source: Source, parts: list[CleaningPart]) -> None:
    for split in SPLITS:
        if next(source.rows(split), None) is None:
            removed = ", ".join(f"{part.name} {part.removed}" for part in parts if part.removed)
            raise DataError(
                f"data.dataset={source.name}: cleaning leaves no {split} document (removed: {removed}); switch one of "
                "these parts of the section `cleaning` off, or give more text."
            )
