"""Files as they are stored: plain, or compressed with gzip or Zstandard."""

import io
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading; what is compressed is decompressed as it is read, and a cut stream raises `OSError`."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    stream = pa.input_stream(str(path), compression=compression)
    return cast(BinaryIO, io.BufferedReader(stream, 2**20))


def format_suffix(path: Path) -> str:
    """The suffix that names a file's format, in small letters: `.jsonl` of both `a.jsonl` and `a.jsonl.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix
