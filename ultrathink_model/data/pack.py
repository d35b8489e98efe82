"""Packing: documents put into rows of one length, so that every token is predicted exactly once.

The stored stream is t₁ … tₙ EOS for each document in turn. A row holds stretches of it as labels, and as input the same
tokens one place later. The input at a document's first position is the EOS of the one before: it opens the document,
belongs to it, and is all that is seen when its first token is predicted. The sum of the labels' losses is thus the
exact code length of the documents, which a packing that leaves each document's first token unpredicted does not give.

Packed as a stream, row i is the stretch [i·S, (i+1)·S): no row but the last has padding, and documents are cut wherever
a row ends. Packed by best fit (Ding et al. 2024, arXiv 2404.10830), only documents longer than a row are cut; the pieces
go, longest first, each into the fullest row that has room for it, and what stays free is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from ultrathink_model.config import Config
from ultrathink_model.data.manifest import ShardInfo
from ultrathink_model.data.media_index import MediaIndex, Run
from ultrathink_model.data.shards import TokenStream, read_ends

IGNORED = -100

Segment = tuple[int, int]
"""A stretch of the stream: where it starts, and its length."""


@dataclass
class Row:
    """One sequence of length S: what is seen, what is predicted, and the document of each position."""

    input_ids: Int64[np.ndarray, " seq"]
    labels: Int64[np.ndarray, " seq"]
    document_ids: Int32[np.ndarray, " seq"]
    media: list[Run] = field(default_factory=list)
    """The images and sounds that the row's input holds tokens of."""


def read_row(
    stream: TokenStream,
    segments: Sequence[Segment],
    sequence_length: int,
    eos_id: int,
    pad_id: int,
    index: MediaIndex | None = None,
) -> Row:
    """A row of some segments; what they leave is filled up with `pad_id`, its labels with -100.

    The tokens of images and sounds, which `index` finds, are seen and never predicted: their labels are -100 too.
    """
    labels = np.full(sequence_length, IGNORED, dtype=np.int64)
    input_ids = np.full(sequence_length, pad_id, dtype=np.int64)
    steps = np.zeros(sequence_length, dtype=np.int32)
    place = 0
    media: list[Run] = []
    for start, length in segments:
        before = max(start - 1, 0)
        tokens, ends = stream.read(before, start + length)
        labels[place : place + length] = tokens[start - before :]
        input_ids[place : place + length] = tokens[:length] if start else np.concatenate([[eos_id], tokens[:-1]])
        inside = ends - (start - before)
        # An end at the segment's last token opens no document within it.
        steps[place + inside[(inside > 0) & (inside < length)]] = 1
        steps[place] = place > 0
        if index is not None:
            # The input runs a token behind the labels; before the stream's first token there is none.
            media += index.runs(before, start + length - 1, place + (start == 0))
            for run in index.runs(start, start + length, place):
                labels[run.place : run.place + run.length] = IGNORED
        place += length
    return Row(input_ids, labels, np.cumsum(steps, dtype=np.int32), media)


def padding_row(sequence_length: int, pad_id: int) -> Row:
    """A row that predicts nothing, for a rank that has none of its own left."""
    return Row(
        np.full(sequence_length, pad_id, dtype=np.int64),
        np.full(sequence_length, IGNORED, dtype=np.int64),
        np.zeros(sequence_length, dtype=np.int32),
    )


class StreamRows:
    """The rows of a stream that is cut every S tokens."""

    def __init__(self, tokens: int, sequence_length: int) -> None:
        self._tokens, self._length = tokens, sequence_length

    def __len__(self) -> int:
        return (self._tokens + self._length - 1) // self._length

    def __getitem__(self, index: int) -> list[Segment]:
        start = index * self._length
        return [(start, min(self._length, self._tokens - start))]


class BestFitRows:
    """The rows of a best-fit packing, mapped from the files that `pack_best_fit` gave.

    Args:
        folder: Folder of the source's split.
    """

    NAMES = ("row_ends.bin", "segment_starts.bin", "segment_lengths.bin")

    def __init__(self, folder: Path) -> None:
        self._ends, self._starts, self._lengths = (
            np.memmap(folder / name, dtype="<i8", mode="r").view(np.ndarray) for name in self.NAMES
        )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> list[Segment]:
        part = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        return list(zip(self._starts[part].tolist(), self._lengths[part].tolist(), strict=True))

    @classmethod
    def write(cls, folder: Path, packed: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Writes a packing beside the shards."""
        for name, values in zip(cls.NAMES, packed, strict=True):
            values.astype("<i8").tofile(folder / name)


def count_rows(config: Config, root: Path, shards: list[ShardInfo], folder: str, tokens: int) -> int:
    """The rows of a source's split; a best-fit packing is made and written for it."""
    length = config.model.max_seq_length
    if config.data.packing == "stream":
        return len(StreamRows(tokens, length))
    bases = np.cumsum([0, *(shard.tokens for shard in shards)])
    ends = [read_ends(root, shard) + base for shard, base in zip(shards, bases[:-1], strict=True)]
    packed = pack_best_fit(np.concatenate(ends), length)
    BestFitRows.write(root / folder, packed)
    return len(packed[0])


def pack_best_fit(
    ends: Int64[np.ndarray, " documents"], sequence_length: int
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " segments"], Int64[np.ndarray, " segments"]]:
    """Best fit, longest first: the end of each row's segments, and the start and length of each segment.

    Args:
        ends: Where each document of the stream ends.
        sequence_length: Length of a row; longer documents are cut into whole rows and a rest.
    """
    starts, lengths = _cut(ends, sequence_length)
    order = np.argsort(-lengths, kind="stable")
    whole = int((lengths == sequence_length).sum())
    rows = np.empty(len(order), dtype=np.int64)
    rows[:whole] = np.arange(whole)
    rows[whole:] = _best_fit(lengths[order[whole:]].tolist(), sequence_length, whole)
    by_row = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=whole)
    return np.cumsum(counts), starts[order][by_row], lengths[order][by_row]


def _cut(ends: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of all documents, none longer than a row."""
    first = np.concatenate([[0], ends[:-1]])
    pieces = -(-(ends - first) // sequence_length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(first, pieces) + number * sequence_length
    return starts, np.minimum(np.repeat(ends, pieces) - starts, sequence_length)


def _best_fit(lengths: list[int], sequence_length: int, first_row: int) -> list[int]:
    """The row of each piece. Rows wait by the room that they have left; a bit for each room tells where any wait."""
    waiting: list[list[int]] = [[] for _ in range(sequence_length)]
    rooms = 0
    chosen = []
    next_row = first_row
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            row, room = next_row, sequence_length
            next_row += 1
        chosen.append(row)
        if room > length:
            waiting[room - length].append(row)
            rooms |= 1 << (room - length)
    return chosen
