"""Where media stand in the stream of tokens of a source's split: the index that a row finds its own by bisection."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from ultrathink_model.data.document import Medium
from ultrathink_model.data.manifest import INDEX_ENTRY_BYTES, INDEX_NAME
from ultrathink_model.media.placeholders import KINDS, Kind

FIELDS = INDEX_ENTRY_BYTES // 8


@dataclass(frozen=True, slots=True)
class Run:
    """The part of a medium's tokens that a row holds.

    Attributes:
        kind: Image or sound.
        number: In the media store.
        tokens: Of the whole medium.
        first: The first of them that the row holds.
        place: Where in the row that one stands.
        length: How many of them the row holds.
    """

    kind: Kind
    number: int
    tokens: int
    first: int
    place: int
    length: int


class MediaIndexWriter:
    """Notes media in the order of the stream.

    Args:
        folder: Folder of the source's split.
        entries: How many an earlier writer noted that stand; what it wrote after those is cut off.
    """

    def __init__(self, folder: Path, entries: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / INDEX_NAME
        path.touch()
        self._file = path.open("r+b")
        self._file.truncate(entries * INDEX_ENTRY_BYTES)
        self._file.seek(entries * INDEX_ENTRY_BYTES)

    def add(self, offset: int, medium: Medium) -> None:
        """Notes that the tokens of a medium begin at `offset` of the stream."""
        entry = (offset, medium.tokens, KINDS.index(medium.kind), medium.number)
        self._file.write(np.asarray(entry, dtype="<i8").tobytes())

    def sync(self) -> None:
        """Forces all that was noted to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finishes the index."""
        self.sync()
        self._file.close()


class MediaIndex:
    """The media of a source's split, mapped from its file."""

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX_NAME
        size = path.stat().st_size
        # An empty file cannot be mapped.
        values = np.memmap(path, dtype="<i8", mode="r").view(np.ndarray) if size else np.zeros(0, dtype="<i8")
        self._entries: Int64[np.ndarray, "media 4"] = values.reshape(-1, FIELDS)

    def runs(self, start: int, stop: int, place: int) -> list[Run]:
        """The media with tokens from `start` to before `stop` of the stream, where `start` stands at a row's `place`."""
        offsets = self._entries[:, 0]
        low, high = (int(np.searchsorted(offsets, at)) for at in (start, stop))
        # The one that begins before may reach in.
        found = []
        for offset, tokens, kind, number in self._entries[max(low - 1, 0) : high].tolist():
            first, last = max(start, offset), min(stop, offset + tokens)
            if first < last:
                found.append(Run(KINDS[kind], number, tokens, first - offset, place + first - start, last - first))
        return found
