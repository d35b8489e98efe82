"""Token shards: flat files of unsigned integers and the ends of their documents, memory-mapped when read."""

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64
from pydantic import BaseModel

from ultrathink_model.data.manifest import ShardInfo

# 2**27 tokens are 256 or 512 MB on disk: few files, yet each small enough to copy or check alone.
SHARD_TOKENS = 2**27
END_BYTES = 8


class WriterState(BaseModel):
    """How far a writer is: its finished shards, and what is on disk of the open one."""

    shards: list[ShardInfo] = []
    tokens: int = 0
    documents: int = 0


class ShardWriter:
    """Writes documents into numbered shards of one folder; a document never spans two shards.

    Args:
        root: Folder that the shards' names are given within.
        folder: Where in it they go.
        dtype: Type of a token.
        shard_tokens: Tokens after which a shard is closed.
        state: Where an earlier writer stopped; what it wrote after that is cut off.
    """

    def __init__(
        self, root: Path, folder: str, dtype: str, shard_tokens: int = SHARD_TOKENS, state: WriterState | None = None
    ) -> None:
        state = state or WriterState()
        self.shards = list(state.shards)
        self._root, self._folder, self._dtype, self._limit = root, folder, np.dtype(dtype), shard_tokens
        self._tokens, self._documents = state.tokens, state.documents
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        (root / folder).mkdir(parents=True, exist_ok=True)
        if self._documents:
            self._open("r+b")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_shard()
        else:
            for file in self._files or ():
                file.close()

    def add(self, tokens: Iterable[int]) -> int:
        """Appends one document and says how many tokens it has."""
        values = np.fromiter(tokens, dtype=self._dtype)
        if self._documents and self._tokens + values.size > self._limit:
            self._close_shard()
        if self._files is None:
            self._open("wb")
        assert self._files is not None
        self._tokens += values.size
        self._documents += 1
        self._files[0].write(values.tobytes())
        self._files[1].write(self._tokens.to_bytes(END_BYTES, "little"))
        return int(values.size)

    def state(self) -> WriterState:
        """Where the writer is, once all that is on disk."""
        for file in self._files or ():
            file.flush()
            os.fsync(file.fileno())
        return WriterState(shards=self.shards, tokens=self._tokens, documents=self._documents)

    def _open(self, mode: str) -> None:
        tokens, ends = ((self._root / self._name(kind)).open(mode) for kind in ("bin", "ends"))
        for file, size in ((tokens, self._tokens * self._dtype.itemsize), (ends, self._documents * END_BYTES)):
            file.truncate(size)
            file.seek(size)
        self._files = tokens, ends  # type: ignore[assignment]

    def _name(self, kind: str) -> str:
        return f"{self._folder}/{len(self.shards):05d}.{kind}"

    def _close_shard(self) -> None:
        if self._files is None:
            return
        self.state()
        for file in self._files:
            file.close()
        info = ShardInfo(
            tokens_file=self._name("bin"),
            documents_file=self._name("ends"),
            tokens=self._tokens,
            documents=self._documents,
        )
        self.shards.append(info)
        self._files, self._tokens, self._documents = None, 0, 0


def read_ends(root: Path, shard: ShardInfo) -> Int64[np.ndarray, " documents"]:
    """The offsets just past the last token of each document of a shard, rising, mapped from the file."""
    return np.memmap(root / shard.documents_file, dtype="<i8", mode="r").view(np.ndarray)


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
