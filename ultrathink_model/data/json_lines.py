"""Reading JSON Lines: each line an object, or a bad row that says why not."""

import json
from collections.abc import Iterator
from pathlib import Path

from ultrathink_model.data.document import BadRow, make_excerpt
from ultrathink_model.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json_lines(path: Path, name: str) -> Iterator[tuple[int, dict[str, object]] | BadRow]:
    """The objects of a file with their line numbers from 1; `name` stands for the file in bad rows.

    Lines of nothing but white space are no rows. A byte order mark before the first line is passed over.

    Raises:
        DataError: The file cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                raw = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                if raw.strip():
                    yield _parse(raw, number, name)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a file that can be read.") from None


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
