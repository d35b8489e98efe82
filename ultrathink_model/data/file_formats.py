"""The formats of local files: text, JSON Lines and Parquet, each read as a stream of rows."""

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ultrathink_model.data.document import BadRow, Row, make_excerpt
from ultrathink_model.data.json_lines import read_json_lines
from ultrathink_model.errors import DataError

BLOCK_BYTES = 2**20
# A text file is one document up to this many characters. Longer ones are cut at the end of a line, so that memory does
# not grow with the file.
DOCUMENT_CHARACTERS = 2**22
PARQUET_BATCH_ROWS = 256

Reader = Callable[[Path, str, str], Iterator[Row | BadRow]]


def read_text(path: Path, name: str, text_column: str) -> Iterator[Row]:
    """A text file as one document, or as several where it passes `DOCUMENT_CHARACTERS`.

    Bytes are kept as they are, line ends too; only a byte order mark at the beginning is taken off.

    Raises:
        DataError: The file cannot be read, or a byte of it is not UTF-8.
    """
    number, document = 0, ""
    for piece in _decode(path):
        document += piece
        while len(document) > DOCUMENT_CHARACTERS:
            cut = document.rfind("\n", 1, DOCUMENT_CHARACTERS) + 1 or DOCUMENT_CHARACTERS
            number += 1
            yield Row(name, number, document[:cut])
            document = document[cut:]
    if document or number == 0:
        yield Row(name, number + 1, document)


def _decode(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                # The decoder holds back the first bytes of a character that the next block completes.
                pending = len(decoder.getstate()[0])
                yield _decode_block(decoder, block, offset - pending, path)
                offset += len(block)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a file that can be read.") from None
    _decode_block(decoder, b"", offset - len(decoder.getstate()[0]), path, final=True)


def _decode_block(decoder: codecs.IncrementalDecoder, block: bytes, start: int, path: Path, final: bool = False) -> str:
    try:
        text = decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = start + error.start
        raise DataError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place} ({error.reason}). Convert the "
            f"file (for one in Latin-1: iconv -f LATIN1 -t UTF-8 {path.name}), or leave it out."
        ) from None
    return text.removeprefix("\ufeff") if start == 0 else text


def read_jsonl(path: Path, name: str, text_column: str) -> Iterator[Row | BadRow]:
    """One document for each line, from its `text_column`."""
    for item in read_json_lines(path, name):
        if isinstance(item, BadRow):
            yield item
            continue
        number, values = item
        if text_column in values:
            yield Row(name, number, values[text_column])
        else:
            yield BadRow(name, number, f"row has the column {text_column!r}", make_excerpt(values))


def read_parquet(path: Path, name: str, text_column: str) -> Iterator[Row | BadRow]:
    """One document for each row, from its `text_column`, a batch of rows in memory at a time.

    Raises:
        DataError: The file is not whole Parquet, or has no such column.
    """
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise DataError(
                    f"{path} has no column {text_column!r} but {', '.join(columns)}; set data.text_column to one of them."
                )
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_column]):
                for value in batch.column(0):
                    number += 1
                    yield _parquet_row(value, name, number)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({' '.join(str(error).split())}); copy or write the file again."
        ) from None


def _parquet_row(value: pa.Scalar, name: str, number: int) -> Row | BadRow:
    try:
        return Row(name, number, value.as_py())
    except UnicodeDecodeError:
        return BadRow(
            name, number, "row is UTF-8", make_excerpt(value.as_buffer().to_pybytes().decode("utf-8", "replace"))
        )


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".text": read_text,
    ".md": read_text,
    ".markdown": read_text,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".pq": read_parquet,
}
