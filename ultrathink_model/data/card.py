"""The data set card: what prepared data were made of, what was done to them, and what they look like."""

import hashlib
import heapq
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from pydantic import BaseModel

from ultrathink_model.data.document import Document, Split, make_excerpt
from ultrathink_model.data.manifest import MEDIA_FOLDER, DataManifest
from ultrathink_model.data.media_store import MediaStore
from ultrathink_model.data.shards import read_ends
from ultrathink_model.media.image import as_data_address

CARD_NAME = "dataset_card.md"
PAGE_NAME = "dataset_card.html"
SAMPLES = 20
THUMBNAIL_SIDE = 64


@dataclass(frozen=True, order=True)
class Sample:
    """A document that stands for its like on the card; those of least hash are drawn, whatever the order of reading."""

    rank: int
    file: str
    row: int
    split: Split
    characters: int
    excerpt: str
    images: tuple[int, ...] = ()
    """Numbers in the media store."""


class NotesState(BaseModel):
    """What was noted of the first documents, but for their hashes."""

    documents: int
    samples: list[tuple[int, int, Sample]]


class Notes:
    """What is noted of a source's documents as they pass: samples, and a hash of each to count equal ones."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._samples: list[tuple[int, int, Sample]] = []
        self._saved = 0

    def save(self, file: Path) -> NotesState:
        """What was noted so far, whose hashes are added to a file."""
        with file.open("r+b" if self._saved else "wb") as hashes:
            hashes.seek(self._saved * self._hashes.itemsize)
            hashes.write(self._hashes[self._saved :].tobytes())
            hashes.flush()
            os.fsync(hashes.fileno())
        self._saved = len(self._hashes)
        return NotesState(documents=self._saved, samples=self._samples)

    def go_on(self, state: NotesState, file: Path) -> None:
        """Takes up what `save` gave, and the hashes of its file."""
        with file.open("rb") as hashes:
            self._hashes.fromfile(hashes, state.documents)
        self._samples, self._saved = list(state.samples), state.documents

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The same documents, each noted."""
        for number, document in enumerate(documents, start=len(self._hashes)):
            content = document.text + "".join(f"\0{medium.kind}{medium.number}" for medium in document.media)
            value = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")
            self._hashes.append(value)
            if len(self._samples) < SAMPLES or -value > self._samples[0][0]:
                excerpt = make_excerpt(document.text)
                images = tuple(medium.number for medium in document.media if medium.kind == "image")
                sample = Sample(value, document.file, document.row, document.split, len(document.text), excerpt, images)
                push = heapq.heappush if len(self._samples) < SAMPLES else heapq.heapreplace
                push(self._samples, (-value, -number, sample))
            yield document

    def duplicates(self) -> int:
        """Documents that equal an earlier one."""
        return len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, dtype=np.uint64)))

    @property
    def samples(self) -> list[Sample]:
        """The samples, those of least hash first."""
        return sorted(sample for _, _, sample in self._samples)


def write_card(manifest: DataManifest, samples: list[Sample], folder: Path) -> None:
    """Writes the card, with a few of the samples, as Markdown and as a page of HTML without scripts."""
    samples = sorted(samples)[:SAMPLES]
    pictures = [_thumbnails(manifest, folder, sample) for sample in samples]
    shown = list(zip(samples, pictures, strict=True))
    values = {"data": manifest, "samples": shown, "histogram": length_histogram(manifest, folder)}
    for name in (CARD_NAME, PAGE_NAME):
        (folder / name).write_text(_render(name, values), encoding="utf-8")


def _thumbnails(manifest: DataManifest, folder: Path, sample: Sample) -> list[str]:
    """The sample's images, small, as addresses that hold them."""
    if manifest.media is None or not sample.images:
        return []
    store = MediaStore(folder / MEDIA_FOLDER, manifest.media)
    return [as_data_address(store.image(number), THUMBNAIL_SIDE) for number in sample.images]


def length_histogram(manifest: DataManifest, folder: Path) -> list[tuple[int, int, int]]:
    """Documents by their tokens: for each doubling, its least and greatest length and the documents in it."""
    counts: Counter[int] = Counter()
    for source in manifest.sources:
        for shards in source.shards.values():
            for shard in shards:
                lengths = np.diff(read_ends(folder, shard), prepend=0)
                exponents, numbers = np.unique(np.frexp(lengths)[1] - 1, return_counts=True)
                counts.update(dict(zip(exponents.tolist(), numbers.tolist(), strict=True)))
    span = range(min(counts), max(counts) + 1)
    return [(1 << exponent, (2 << exponent) - 1, counts[exponent]) for exponent in span]


def _render(name: str, values: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ultrathink_model.data"),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").split())
    return environment.get_template(name).render(values)
