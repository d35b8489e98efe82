"""Token shards: flat files of unsigned integers and the ends of their documents, memory-mapped when read."""

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from ultrathink_model.data.manifest import ShardInfo

# 2**27 tokens are 256 or 512 MB on disk: few files, yet each small enough to copy or check alone.
SHARD_TOKENS = 2**27


class ShardWriter:
    """Writes documents into numbered shards of one folder; a document never spans two shards."""

    def __init__(self, root: Path, folder: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.shards: list[ShardInfo] = []
        self._root, self._folder, self._dtype, self._limit = root, folder, np.dtype(dtype), shard_tokens
        self._ends: list[int] = []
        self._file: BinaryIO | None = None
        (root / folder).mkdir(parents=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_shard()
        elif self._file is not None:
            self._file.close()

    def add(self, tokens: Iterable[int]) -> int:
        """Appends one document and says how many tokens it has."""
        values = np.fromiter(tokens, dtype=self._dtype)
        length = self._ends[-1] if self._ends else 0
        if self._ends and length + values.size > self._limit:
            self._close_shard()
            length = 0
        if self._file is None:
            self._file = (self._root / self._name("bin")).open("wb")
        self._file.write(values.tobytes())
        self._ends.append(length + values.size)
        return int(values.size)

    def _name(self, kind: str) -> str:
        return f"{self._folder}/{len(self.shards):05d}.{kind}"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with (self._root / self._name("ends.npy")).open("wb") as file:
            np.save(file, np.asarray(self._ends, dtype=np.int64), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        info = ShardInfo(
            tokens_file=self._name("bin"),
            documents_file=self._name("ends.npy"),
            tokens=self._ends[-1],
            documents=len(self._ends),
        )
        self.shards.append(info)
        self._file, self._ends = None, []


class TokenStream:
    """The shards of one source and split, read as one stream of tokens."""

    def __init__(self, root: Path, shards: list[ShardInfo], dtype: str) -> None:
        self._tokens = [
            np.memmap(root / shard.tokens_file, dtype=np.dtype(dtype), mode="r").view(np.ndarray) for shard in shards
        ]
        self._ends = [
            np.load(root / shard.documents_file, mmap_mode="r", allow_pickle=False).view(np.ndarray) for shard in shards
        ]
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
