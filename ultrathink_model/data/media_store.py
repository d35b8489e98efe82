"""The media store: preprocessed images and sounds, each once whatever the number of its uses, mapped when read.

Images are bytes of (3, side, side), sounds float16 log-mels of (mel, frames); log-mels lie between -1.5 and about 2,
where float16 is off by at most 0.0005. Beside each file lie the SHA-256 of what its entries were made from, which is
what finds an entry again.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from jaxtyping import Float16, UInt8

from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.data.document import Medium
from ultrathink_model.data.manifest import DIGEST_BYTES, MediaInfo
from ultrathink_model.errors import MediaError
from ultrathink_model.media.audio import load_audio, log_mel
from ultrathink_model.media.counts import frame_tokens, image_tokens
from ultrathink_model.media.image import load_image
from ultrathink_model.media.placeholders import Kind
from ultrathink_model.media.source import describe, read_bytes

# What is not yet on disk is made again after a kill: no more than this.
UNSYNCED_BYTES = 2**26


class MediaWriter:
    """Adds media to a store, and takes up what an earlier writer left.

    Args:
        folder: Where the store is or will be.
        config: How images and sounds are preprocessed.
    """

    def __init__(self, folder: Path, config: MultimodalConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._images, self._sounds = _Entries(folder / "images"), _Entries(folder / "audio")

    def add(self, kind: Kind, source: bytes | Path) -> Medium:
        """Stores a medium unless it is there already.

        Raises:
            MediaError: It cannot be used.
        """
        data = read_bytes(source)
        entries, config = (self._images if kind == "image" else self._sounds), self._config
        digest = hashlib.sha256(data).digest()
        number = entries.find(digest)
        if number is None:
            try:
                array = (
                    load_image(data, config) if kind == "image" else _pack(log_mel(load_audio(data, config), config))
                )
            except MediaError as error:
                raise MediaError(error.rule, f"{describe(source)}: {error.found}") from None
            number = entries.add(digest, array.tobytes())
        if kind == "image":
            return Medium(kind, number, image_tokens(config))
        frames = entries.size(number) // (2 * config.mel_bins)
        return Medium(kind, number, frame_tokens(config, frames))

    def sync(self) -> None:
        """Forces all that was added to the disk."""
        self._images.sync()
        self._sounds.sync()

    @property
    def counts(self) -> tuple[int, int]:
        """How many images and how many sounds the store holds."""
        return self._images.count, self._sounds.count

    @property
    def sound_bytes(self) -> int:
        """The size of all sounds together."""
        return self._sounds.bytes

    def __enter__(self) -> "MediaWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.sync()
        self._images.close()
        self._sounds.close()


class MediaStore:
    """A finished store.

    Args:
        folder: Where it is.
        info: How its media were preprocessed.
    """

    def __init__(self, folder: Path, info: MediaInfo) -> None:
        self._side, self._bins = info.image_size, info.mel_bins
        self._images, self._sounds = (_Mapped(folder / name) for name in ("images", "audio"))

    def image(self, number: int) -> UInt8[np.ndarray, "3 side side"]:
        """The pixels of an image."""
        return self._images[number].reshape(3, self._side, self._side)

    def sound(self, number: int) -> Float16[np.ndarray, "mel frames"]:
        """The log-mel spectrogram of a sound."""
        return self._sounds[number].view(np.float16).reshape(self._bins, -1)


def _pack(spectrogram: np.ndarray) -> np.ndarray:
    return spectrogram.astype("<f2")


class _Entries:
    """Entries of any length in one file, with the end of each and the digest of what it was made from.

    Digests reach the disk after what they stand for, so that one that is there after a kill vouches for its entry.
    """

    def __init__(self, stem: Path) -> None:
        names = [stem.with_suffix(suffix) for suffix in (".bin", ".ends", ".sha256")]
        for name in names:
            name.touch()
        digests = names[2].read_bytes()
        ends = np.fromfile(names[1], dtype="<i8")
        count = min(len(digests) // DIGEST_BYTES, len(ends))
        self._ends: list[int] = ends[:count].tolist()
        self._numbers = {digests[n * DIGEST_BYTES : (n + 1) * DIGEST_BYTES]: n for n in range(count)}
        self._written, self._unsynced = count, 0
        self._digests: list[bytes] = []
        sizes = (self._ends[-1] if count else 0, 8 * count, DIGEST_BYTES * count)
        self._files = [_open_at(name, size) for name, size in zip(names, sizes, strict=True)]

    def find(self, digest: bytes) -> int | None:
        return self._numbers.get(digest)

    def size(self, number: int) -> int:
        return self._ends[number] - (self._ends[number - 1] if number else 0)

    def add(self, digest: bytes, data: bytes) -> int:
        number = len(self._ends)
        self._files[0].write(data)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(data))
        self._numbers[digest] = number
        self._digests.append(digest)
        self._unsynced += len(data)
        if self._unsynced > UNSYNCED_BYTES:
            self.sync()
        return number

    def sync(self) -> None:
        new = np.asarray(self._ends[self._written :], dtype="<i8").tobytes(), b"".join(self._digests)
        _force(self._files[0])
        for file, data in zip(self._files[1:], new, strict=True):
            file.write(data)
            _force(file)
        self._written, self._unsynced, self._digests = len(self._ends), 0, []

    def close(self) -> None:
        for file in self._files:
            file.close()

    @property
    def count(self) -> int:
        return len(self._ends)

    @property
    def bytes(self) -> int:
        return self._ends[-1] if self._ends else 0


class _Mapped:
    def __init__(self, stem: Path) -> None:
        self._ends = np.fromfile(stem.with_suffix(".ends"), dtype="<i8")
        file = stem.with_suffix(".bin")
        # An empty file cannot be mapped.
        self._data = np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray) if len(self._ends) else None

    def __getitem__(self, number: int) -> np.ndarray:
        assert self._data is not None, "nothing is stored, so nothing can be asked for"
        return self._data[self._ends[number - 1] if number else 0 : self._ends[number]]


def _open_at(path: Path, size: int) -> BinaryIO:
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _force(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
