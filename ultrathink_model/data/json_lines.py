"""Reading JSON Lines: each line an object, or a bad row that says why not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ultrathink_model.data.compression import open_bytes
from ultrathink_model.data.document import BadRow, make_excerpt
from ultrathink_model.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A longer row is refused unread: a damaged file of one endless line must not fill the memory.
MAX_ROW_BYTES = 2**28


def read_json_lines(path: Path, name: str) -> Iterator[tuple[int, dict[str, object]] | BadRow]:
    """The objects of a file with their line numbers from 1; `name` stands for the file in bad rows.

    Lines of nothing but white space are no rows. A byte order mark before the first line is passed over. Files whose
    names end in .gz or .zst are decompressed.

    Raises:
        DataError: The file cannot be opened or read.
    """
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(_lines(file), start=1):
                raw = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                if len(raw) > MAX_ROW_BYTES:
                    excerpt = make_excerpt(raw[:1000].decode("utf-8", "replace"))
                    yield BadRow(name, number, f"row has at most {MAX_ROW_BYTES >> 20} MiB", excerpt)
                elif raw.strip():
                    yield _parse(raw, number, name)
    except OSError as error:
        # The decompressor's errors have no number: its stream is cut or damaged.
        reason = f"{error.strerror}; name a file that can be read" if error.strerror else f"{error}; copy it again"
        raise DataError(f"{path}: {reason}.") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one over `MAX_ROW_BYTES` only its beginning, still too long."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        yield line
        while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES + 1)


def _parse(raw: bytes, number: int, name: str) -> tuple[int, dict[str, object]] | BadRow:
    excerpt = make_excerpt(raw[:1000].decode("utf-8", "replace").rstrip("\r\n"))
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError:
        return BadRow(name, number, "row is UTF-8", excerpt)
    except (ValueError, RecursionError):
        return BadRow(name, number, "row is JSON", excerpt)
    if not isinstance(value, dict):
        return BadRow(name, number, "row is a JSON object", excerpt)
    if b"\\u" in raw and not _is_unicode(value):
        return BadRow(name, number, "row is Unicode", excerpt)
    return number, value


def _is_unicode(value: object) -> bool:
    """Whether no string within holds half of a surrogate pair, which JSON can spell and which no encoding can write."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
