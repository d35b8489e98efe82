"""Token shards: flat files of unsigned integers and the ends of their documents, memory-mapped when read."""

import os
from collections.abc import Iterable
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Int64
from pydantic import BaseModel

from ultrathink_model.data.manifest import ShardInfo

# 2**27 tokens are 256 or 512 MB on disk: few files, yet each small enough to copy or check alone.
SHARD_TOKENS = 2**27
# Tokens that one task writes, and tasks of a writer that may wait: some 32 MB of memory.
PIECE_TOKENS = 2**20
PIECES_AHEAD = 8
END_TYPE = np.dtype("<i8")


class WriterState(BaseModel):
    """How far a writer is: its finished shards, and what is on disk of the open one."""

    shards: list[ShardInfo] = []
    tokens: int = 0
    documents: int = 0


class ShardWriter:
    """Writes documents into numbered shards of one folder; a document never spans two shards.

    Where each piece of a shard goes is settled as its documents come, so that the bytes are the same however many
    pieces, of one shard or of several, are written at the same time.

    Args:
        root: Folder that the shards' names are given within.
        folder: Where in it they go.
        dtype: Type of a token.
        pool: Writes the pieces.
        shard_tokens: Tokens after which a shard is closed.
        piece_tokens: Tokens after which a piece is handed to the pool.
        state: Where an earlier writer stopped; what it wrote after that is cut off.
    """

    def __init__(
        self,
        root: Path,
        folder: str,
        dtype: str,
        pool: Executor,
        *,
        shard_tokens: int = SHARD_TOKENS,
        piece_tokens: int = PIECE_TOKENS,
        state: WriterState | None = None,
    ) -> None:
        state = state or WriterState()
        self.shards = list(state.shards)
        self._root, self._folder, self._dtype, self._pool = root, folder, np.dtype(dtype), pool
        self._shard_tokens, self._piece_tokens = shard_tokens, piece_tokens
        self._tokens, self._documents = state.tokens, state.documents
        self._piece: list[np.ndarray] = []
        self._piece_start = self._tokens
        self._writes: list[Future[None]] = []
        (root / folder).mkdir(parents=True, exist_ok=True)
        if self._documents:
            self._set_sizes("r+b")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._close_shard()
                self.state()
        finally:
            # After an error, the next start may be in this process, and writes the same files.
            for write in self._writes:
                write.cancel()
            wait(self._writes)

    def add(self, tokens: Iterable[int]) -> int:
        """Appends one document and says how many tokens it has.

        Raises:
            OSError: An earlier piece could not be written.
        """
        values = np.fromiter(tokens, dtype=self._dtype)
        if self._documents and self._tokens + values.size > self._shard_tokens:
            self._close_shard()
        if not self._documents:
            self._set_sizes("wb")
        self._tokens += values.size
        self._documents += 1
        self._piece.append(values)
        if self._tokens - self._piece_start >= self._piece_tokens:
            self._hand_over()
        return int(values.size)

    def state(self) -> WriterState:
        """Where the writer is, once all that is on disk.

        Raises:
            OSError: A piece could not be written.
        """
        self._hand_over()
        self._await_writes(0)
        return WriterState(shards=self.shards, tokens=self._tokens, documents=self._documents)

    def _hand_over(self) -> None:
        """Has the documents that were gathered written at their places in the open shard."""
        if not self._piece:
            return
        self._await_writes(PIECES_AHEAD - 1)
        ends = self._piece_start + np.cumsum([values.size for values in self._piece], dtype=END_TYPE)
        first = self._documents - len(self._piece)
        tokens_file, ends_file = self._paths()
        self._writes.append(self._pool.submit(_write_at, tokens_file, self._piece_start, np.concatenate(self._piece)))
        self._writes.append(self._pool.submit(_write_at, ends_file, first, ends))
        self._piece, self._piece_start = [], self._tokens

    def _await_writes(self, most: int) -> None:
        """Waits until at most so many pieces are unwritten."""
        while len(self._writes) > 2 * most:
            self._writes[0].result()
            self._writes.pop(0)

    def _paths(self) -> tuple[Path, Path]:
        return self._root / self._name("bin"), self._root / self._name("ends")

    def _name(self, kind: str) -> str:
        return f"{self._folder}/{len(self.shards):05d}.{kind}"

    def _set_sizes(self, mode: str) -> None:
        """Opens the shard's files and makes them as long as what is known to be in them."""
        sizes = self._tokens * self._dtype.itemsize, self._documents * END_TYPE.itemsize
        for path, size in zip(self._paths(), sizes, strict=True):
            with path.open(mode) as file:
                file.truncate(size)

    def _close_shard(self) -> None:
        if not self._documents:
            return
        self._hand_over()
        info = ShardInfo(
            tokens_file=self._name("bin"),
            documents_file=self._name("ends"),
            tokens=self._tokens,
            documents=self._documents,
        )
        self.shards.append(info)
        self._tokens = self._documents = self._piece_start = 0


def _write_at(path: Path, place: int, values: np.ndarray) -> None:
    """Writes values from the `place`-th of a file on, and forces them to the disk."""
    with path.open("r+b") as file:
        file.seek(place * values.itemsize)
        file.write(values.data)
        file.flush()
        os.fsync(file.fileno())


def read_ends(root: Path, shard: ShardInfo) -> Int64[np.ndarray, " documents"]:
    """The offsets just past the last token of each document of a shard, rising, mapped from the file."""
    return np.memmap(root / shard.documents_file, dtype=END_TYPE, mode="r").view(np.ndarray)


class TokenStream:
    """The shards of one source and split, read as one stream of tokens."""

    def __init__(self, root: Path, shards: list[ShardInfo], dtype: str) -> None:
        self._tokens = [
            np.memmap(root / shard.tokens_file, dtype=np.dtype(dtype), mode="r").view(np.ndarray) for shard in shards
        ]
        self._ends = [read_ends(root, shard) for shard in shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " tokens"], Int64[np.ndarray, " documents"]]:
        """The tokens from `start` to before `stop`, and the documents that end there.

        Returns:
            The tokens, and the offsets from `start` just past each document's last token, rising.
        """
        tokens, ends = [], []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for number in range(first, len(self._tokens)):
            base = int(self._starts[number])
            if base >= stop:
                break
            low, high = max(start - base, 0), stop - base
            tokens.append(self._tokens[number][low:high].astype(np.int64))
            all_ends = self._ends[number]
            inside = all_ends[
                np.searchsorted(all_ends, low, side="right") : np.searchsorted(all_ends, high, side="right")
            ]
            ends.append(inside + (base - start))
        return np.concatenate(tokens), np.concatenate(ends)
