"""Where documents come from: one interface, and the choice of the source that a name stands for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from ultrathink_model.config.data import DataConfig, DataSource
from ultrathink_model.data.digits import DigitsSource
from ultrathink_model.data.document import BadRow, Row
from ultrathink_model.data.dummy import DummySource
from ultrathink_model.data.file_hashes import FileHashes
from ultrathink_model.data.hub import HubSource, StreamPlace
from ultrathink_model.data.known import KNOWN_DATASETS, KnownDataset
from ultrathink_model.data.local import LocalSource, find_files, looks_like_path
from ultrathink_model.data.manifest import Split
from ultrathink_model.data.sotu import SotuSource


@runtime_checkable
class Source(Protocol):
    """A set of documents that can be read again and again in the same order."""

    @property
    def name(self) -> str:
        """What the source is called in messages."""
        ...

    @property
    def licence(self) -> str:
        """The terms of its text."""
        ...

    @property
    def streaming(self) -> bool:
        """Whether rows come from afar as they are read, so that no more should be read than is used."""
        ...

    @property
    def has_validation(self) -> bool:
        """Whether it brings a validation split of its own; if not, all its rows are in "train"."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder that the paths of its rows' media stay within; None for a source whose rows hold no paths."""
        ...

    def identity(self) -> dict[str, object]:
        """Plain values that change when the documents would: what the fingerprint covers."""
        ...

    def rows(self, split: Split) -> Iterator[Row | BadRow]:
        """The rows of a split, read as a stream."""
        ...


@runtime_checkable
class ResumableSource(Source, Protocol):
    """A source that can go on after a row without reading those before it."""

    def place(self, row: int) -> StreamPlace | None:
        """Where the split that is being read goes on after a row, if it can."""
        ...

    def rows(self, split: Split, place: StreamPlace | None = None) -> Iterator[Row | BadRow]:
        """The rows of a split, or those after a place."""
        ...


@dataclass(frozen=True)
class Ingredient:
    """A source of the mixture, and the identity that the fingerprint was made of."""

    spec: DataSource
    source: Source
    identity: dict[str, object]


BUILT_IN: dict[str, Callable[[], Source]] = {"sotu": SotuSource, "dummy": DummySource, "digits": DigitsSource}


def open_source(name: str, data: DataConfig, media: bool = False) -> Source:
    """The source that `data.dataset` or a part of `data.mix_datasets` names.

    A known name means the dataset of that name, whatever lies in the working folder; `./NAME` means the file or folder.
    With `media` the images and sounds count that its rows name.

    Raises:
        DataError: There is nothing of that name.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    known = KNOWN_DATASETS.get(name)
    mirror = find_mirror(name, known, data)
    if mirror is not None or (known is None and looks_like_path(name)):
        files = find_files(name) if mirror is None else find_files(str(mirror), within=data.mirror_dir)
        described = known or KnownDataset(name, licence="")
        column = data.text_column or described.text_column
        return LocalSource(name, files, column, FileHashes(Path(data.cache_dir)), described.article_heading, media)
    known = known or KnownDataset(name, licence="as stated on the hub")
    wanted = {"subset": data.dataset_config, "text_column": data.text_column}
    known = replace(known, **{key: value for key, value in wanted.items() if value is not None})
    return HubSource(name, known, data.streaming, media)


def find_mirror(name: str, known: KnownDataset | None, data: DataConfig) -> Path | None:
    """The folder or file of `data.mirror_dir` that stands for a hub dataset, by its short name or its hub id.

    Within it, a folder with the name of the subset is taken where there is one.
    """
    if data.mirror_dir is None:
        return None
    places = [Path(data.mirror_dir, name), *([Path(data.mirror_dir, known.hub_id)] if known else [])]
    place = next((place for place in places if place.exists()), None)
    subset = data.dataset_config or (known.subset if known else None)
    if place is not None and subset is not None and (place / subset).is_dir():
        return place / subset
    return place
