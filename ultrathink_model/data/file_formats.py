"""The formats of local files: text, JSON Lines, CSV and Parquet, each read as a stream of rows."""

import codecs
import csv
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ultrathink_model.data.compression import COMPRESSIONS, open_bytes
from ultrathink_model.data.document import BadRow, Row, make_excerpt
from ultrathink_model.data.json_lines import MAX_ROW_BYTES, read_json_lines
from ultrathink_model.data.media_values import COLUMNS
from ultrathink_model.errors import DataError

BLOCK_BYTES = 2**20
# A text file is one document up to this many characters. Longer ones are cut at the end of a line, so that memory does
# not grow with the file.
DOCUMENT_CHARACTERS = 2**22
PARQUET_BATCH_ROWS = 256
WIDE_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

Reader = Callable[[Path, str, str, bool], Iterator[Row | BadRow]]
"""Path, name in messages, column of the text, whether to read the columns of images and sounds too."""


def read_text(path: Path, name: str, text_column: str, media: bool = False) -> Iterator[Row | BadRow]:
    """A text file as one document, or as several where it passes `DOCUMENT_CHARACTERS`.

    Bytes are kept as they are, line ends too; only a byte order mark at the beginning is taken off. A file with a byte
    that is not UTF-8 is a bad row; of one that was cut, the documents before that byte stand.

    Raises:
        DataError: The file cannot be read.
    """
    number, document = 0, ""
    try:
        for piece in _decode(path):
            document += piece
            while len(document) > DOCUMENT_CHARACTERS:
                cut = document.rfind("\n", 1, DOCUMENT_CHARACTERS) + 1 or DOCUMENT_CHARACTERS
                number += 1
                yield Row(name, number, document[:cut])
                document = document[cut:]
    except UnicodeDecodeError as error:
        yield BadRow(name, number + 1, "file is UTF-8", _explain_encoding(error, path))
        return
    if document or number == 0:
        yield Row(name, number + 1, document)


def _decode(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with open_bytes(path) as file:
            while block := file.read(BLOCK_BYTES):
                # The decoder holds back the first bytes of a character that the next block completes.
                pending = len(decoder.getstate()[0])
                yield _decode_block(decoder, block, offset - pending)
                offset += len(block)
    except OSError as error:
        raise _unreadable(path, error) from None
    _decode_block(decoder, b"", offset - len(decoder.getstate()[0]), final=True)


def _decode_block(decoder: codecs.IncrementalDecoder, block: bytes, start: int, final: bool = False) -> str:
    try:
        text = decoder.decode(block, final)
    except UnicodeDecodeError as error:
        error.start += start  # from the block's beginning to the file's
        error.end = error.start + 1
        raise
    return text.removeprefix("\ufeff") if start == 0 else text


def _explain_encoding(error: UnicodeDecodeError, path: Path) -> str:
    with open_bytes(path) as file:
        encoding = WIDE_MARKS.get(file.read(2), "LATIN1")
    return (
        f"{error.reason} at offset {error.start}; convert the file (for one in {encoding}: "
        f"iconv -f {encoding} -t UTF-8 {path.name}), or leave it out"
    )


def read_jsonl(path: Path, name: str, text_column: str, media: bool = False) -> Iterator[Row | BadRow]:
    """One document for each line, from its `text_column`."""
    for item in read_json_lines(path, name):
        if isinstance(item, BadRow):
            yield item
            continue
        number, values = item
        if text_column in values:
            yield Row(name, number, values[text_column], **_media_of(values, media))
        else:
            yield BadRow(name, number, f"row has the column {text_column!r}", make_excerpt(values))


def read_csv(path: Path, name: str, text_column: str, media: bool = False) -> Iterator[Row | BadRow]:
    """One document for each record after the header, from its `text_column`; fields may hold quoted line ends.

    Raises:
        DataError: The file cannot be read, or its header has no such column.
    """
    for number, record in read_csv_records(path, name, (text_column,)):
        yield record if isinstance(record, BadRow) else Row(name, number, record[text_column])


def read_csv_records(path: Path, name: str, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str] | BadRow]]:
    """The records of a CSV file by column, with their numbers from 1; records of another width are bad rows.

    Raises:
        DataError: The file cannot be read, or its header lacks a wanted column.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    try:
        with open_bytes(path) as raw:
            # Bytes that are not UTF-8 become lone surrogates, which mark their record and no other as bad.
            lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
            records = csv.reader(lines, strict=True)
            header = next(records, [])
            missing = [column for column in wanted if column not in header]
            if missing and header:
                raise DataError(
                    f"{path} has no column {missing[0]!r} but {', '.join(header)}; set data.text_column to one of them."
                )
            for number, record in enumerate(records, start=1):
                if record:
                    yield number, _csv_record(name, number, header, record)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV ({error}); write the file again with quoted fields.") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _csv_record(name: str, number: int, header: list[str], record: list[str]) -> dict[str, str] | BadRow:
    excerpt = make_excerpt(",".join(record))
    if len(record) != len(header):
        return BadRow(name, number, f"row has the header's {len(header)} fields", excerpt)
    try:
        ",".join(record).encode()
    except UnicodeEncodeError:
        return BadRow(name, number, "row is UTF-8", excerpt)
    return dict(zip(header, record, strict=True))


def read_parquet(path: Path, name: str, text_column: str, media: bool = False) -> Iterator[Row | BadRow]:
    """One document for each row, from its `text_column`, a batch of rows in memory at a time.

    Raises:
        DataError: The file is not whole Parquet, or has no such column.
    """
    try:
        with pq.ParquetFile(_seekable(path)) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise DataError(
                    f"{path} has no column {text_column!r} but {', '.join(columns)}; set data.text_column to one of them."
                )
            number = 0
            wanted = [text_column, *(column for column in COLUMNS.values() if media and column in columns)]
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=wanted):
                for row in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(
                        {column: batch.column(column)[row] for column in wanted}, name, number, text_column
                    )
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({' '.join(str(error).split())}); copy or write the file again."
        ) from None


def _seekable(path: Path) -> Path | pa.BufferReader:
    """Parquet is read from its end: a compressed file is first decompressed into memory."""
    if path.suffix.lower() not in COMPRESSIONS:
        return path
    with open_bytes(path) as file:
        return pa.BufferReader(file.read())


def _media_of(values: Mapping[str, object], media: bool) -> dict[str, Any]:
    return {column: values.get(column) for column in COLUMNS.values()} if media else {}


def _parquet_row(values: Mapping[str, pa.Scalar], name: str, number: int, text_column: str) -> Row | BadRow:
    text = values[text_column]
    try:
        media = {column: value.as_py() for column, value in values.items() if column != text_column}
    except UnicodeDecodeError as error:
        return BadRow(name, number, "row is UTF-8", make_excerpt(bytes(error.object).decode("utf-8", "replace")))
    try:
        return Row(name, number, text.as_py(), **media)
    except UnicodeDecodeError:
        return BadRow(
            name, number, "row is UTF-8", make_excerpt(text.as_buffer().to_pybytes().decode("utf-8", "replace"))
        )


def _unreadable(path: Path, error: OSError) -> DataError:
    if error.strerror is None:
        # Of the decompressor: a cut or damaged stream.
        return DataError(f"{path} is damaged ({error}); copy the file again.")
    return DataError(f"{path}: {error.strerror}; name a file that can be read.")


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".text": read_text,
    ".md": read_text,
    ".markdown": read_text,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".pq": read_parquet,
}
