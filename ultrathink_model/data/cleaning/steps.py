"""The steps of the cleaning pipelines that datatrove lacks: our document files, and our own filters and formatters."""

import json
import unicodedata
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontFilter
from datatrove.pipeline.dedup import exact_dedup, minhash
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.formatters.base import BaseFormatter
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from tqdm import tqdm

from ultrathink_model.data.cleaning.pii import mask_pii
from ultrathink_model.data.document import make_excerpt

# A language is told from this much of a document.
LANGUAGE_CHARACTERS = 4096

# Their bars of one file each have no switch, and would fill a log.
exact_dedup.tqdm = minhash.tqdm = partial(tqdm, disable=True)

Documents = Iterator[Document]


def task_file(folder: Path, task: int) -> Path:
    """The file of documents that a task reads or writes."""
    return folder / f"{task:05d}.jsonl"


class ReadDocuments(PipelineStep):
    """Reads a task's own file; datatrove's readers deal out whatever files are there, and an empty task leaves none."""

    type, name = "reader", "read"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Documents:
        """The documents of task `rank`."""
        with task_file(self.folder, rank).open(encoding="utf-8") as lines:
            for line in lines:
                values = json.loads(line)
                text = values.pop("text")
                yield Document(text=text, id=f"{values['file']}:{values['row']}", metadata=values)


class WriteDocuments(PipelineStep):
    """Writes what is left of a task's documents, whole or not at all, and passes them on."""

    type, name = "writer", "write"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """The same documents, each written first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = task_file(self.folder, rank)
        part = target.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for document in data:
                kept = {key: document.metadata[key] for key in ("file", "row", "split")}
                file.write(json.dumps({"text": document.text} | kept, ensure_ascii=False) + "\n")
                self.stat_update(document.metadata["split"])
                yield document
        part.replace(target)


class RemovedLog:
    """What datatrove calls an exclusion writer: keeps where each removed document stood, why it went, and its beginning."""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = folder / part, part
        self._files: dict[int, TextIO] = {}

    def __enter__(self) -> "RemovedLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def write(self, document: Document, rank: int = 0) -> None:
        """Notes a removed document."""
        if rank not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[rank] = task_file(self.folder, rank).open("w", encoding="utf-8")
        place = {key: document.metadata[key] for key in ("file", "row", "split")}
        reason = document.metadata.get("filter_reason", self.part)
        line = place | {"part": self.part, "reason": reason, "excerpt": make_excerpt(document.text)}
        self._files[rank].write(json.dumps(line, ensure_ascii=False) + "\n")


class Repair(FTFYFormatter):
    """ftfy's repair, with a count of the documents that it changed."""

    name = "repair"

    def format(self, text: str) -> str:
        """The text, mended."""
        mended = str(super().format(text))
        if mended != text:
            self.stat_update("changed")
        return mended


class Normalize(BaseFormatter):
    """A Unicode normal form, with a count of the documents that it changed."""

    name = "normalize"

    def __init__(self, form: Literal["NFC", "NFKC"]) -> None:
        super().__init__()
        self.form = form

    def format(self, text: str) -> str:
        """The text in the normal form."""
        normal = unicodedata.normalize(self.form, text)
        if normal != text:
            self.stat_update("changed")
        return normal


class MaskPii(BaseFormatter):
    """Masks personal data, with a count of each kind."""

    name = "mask_pii"

    def format(self, text: str) -> str:
        """The text with masks."""
        masked, counts = mask_pii(text)
        for mask, count in counts.items():
            self.stat_update(f"masked {mask}", value=count)
        return masked


class KeepLanguages(BaseFilter):
    """Keeps documents of some languages, told by py3langid, whose model comes with its package.

    datatrove's own language filters download a model when they are first used.
    """

    name = "languages"

    def __init__(self, languages: list[str], exclusion_writer: RemovedLog) -> None:
        super().__init__(exclusion_writer)
        self.languages = languages

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        return LanguageIdentifier.from_model_file(MODEL_FILE)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the language is among those that are kept; else which it is."""
        language = self._identifier.classify(doc.text[:LANGUAGE_CHARACTERS])[0]
        return True if language in self.languages else (False, f"language {language}")


class Decontaminate(NGramsDecontFilter):
    """Removes training documents that share an n-gram with an evaluation set; the held-out split itself stays."""

    name = "decontaminate"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether a document shares nothing; else with which evaluation set it does."""
        if doc.metadata["split"] != "train":
            return True
        kept = super().filter(doc)
        return True if kept is True else (False, f"shared with {doc.metadata['contaminated_task']}")


def known_languages() -> set[str]:
    """The codes that `KeepLanguages` can tell."""
    return {str(language) for language in LanguageIdentifier.from_model_file(MODEL_FILE).nb_classes}
