"""The schema of a document, checked over chunks of rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pandas as pd
import pandera.pandas as pa

from ultrathink_model.data.document import BadRow, Row, make_excerpt
from ultrathink_model.data.media_values import COLUMNS, media_values
from ultrathink_model.media.placeholders import PLACEHOLDERS, Kind

# Rows checked at once: many, since a check costs milliseconds whatever it checks, but few if they are long.
CHUNK_ROWS = 4096
CHUNK_CHARACTERS = 2**22


def text_column() -> pa.Column:
    """A column of strings that are not blank and hold no NUL.

    Each rule holds by itself for what an earlier one refuses, so that a value breaks one rule only.
    """

    def rule(name: str, holds: Callable[[str], bool]) -> pa.Check:
        return pa.Check(
            lambda value: not isinstance(value, str) or holds(value), element_wise=True, ignore_na=False, name=name
        )

    is_string = pa.Check(
        lambda value: isinstance(value, str), element_wise=True, ignore_na=False, name="value is a string"
    )
    return pa.Column(
        object,
        checks=[
            is_string,
            rule("value is not empty", lambda value: bool(value.strip())),
            rule("value has no NUL", lambda value: "\0" not in value),
        ],
        nullable=True,
    )


def media_column(kind: Kind) -> pa.Column:
    """A column of lists of paths or bytes, each beside the number of its row's placeholders."""
    token, column = PLACEHOLDERS[kind], COLUMNS[kind]
    is_list = pa.Check(
        lambda cell: media_values(cell[1]) is not None, element_wise=True, name="value is a list of paths or bytes"
    )

    def as_many(cell: tuple[int, object]) -> bool:
        values = media_values(cell[1])
        return values is None or len(values) == cell[0]

    count = pa.Check(as_many, element_wise=True, name=f"text has as many {token} as {column}")
    return pa.Column(object, checks=[is_list, count])


DOCUMENT_SCHEMA = pa.DataFrameSchema({"text": text_column()}, strict=True)
MEDIA_SCHEMA = pa.DataFrameSchema(
    {"text": text_column()} | {COLUMNS[kind]: media_column(kind) for kind in PLACEHOLDERS}, strict=True
)


def labelled_schema(labels: Sequence[str]) -> pa.DataFrameSchema:
    """Rows of a `text` and the list of the `labels` that apply to it, which may be empty."""
    is_list = pa.Check(lambda value: isinstance(value, list), element_wise=True, name="value is a list")
    known = pa.Check(
        lambda value: not isinstance(value, list) or all(label in labels for label in value),
        element_wise=True,
        name=f"value holds only {', '.join(labels)}",
    )
    return pa.DataFrameSchema(
        {"text": text_column(), "labels": pa.Column(object, checks=[is_list, known], nullable=True)}, strict=True
    )


def check_rows(rows: Iterable[Row | BadRow], media: bool = False) -> Iterator[Row | BadRow]:
    """The rows that keep the schema as they are, and the others as bad rows, in the order they came.

    Args:
        rows: As a source gives them.
        media: Whether the images and sounds that rows name count.
    """
    chunk: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += _size(row)
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield from _check_chunk(chunk, media)
            chunk, characters = [], 0
    if chunk:
        yield from _check_chunk(chunk, media)


def _check_chunk(chunk: list[Row | BadRow], media: bool) -> Iterator[Row | BadRow]:
    rows = [row if isinstance(row, Row) else Row(row.file, row.row, "unread") for row in chunk]
    columns: dict[str, list[object]] = {"text": [row.text for row in rows]}
    if media:
        columns |= {
            COLUMNS[kind]: [(_placeholders(row, kind), getattr(row, COLUMNS[kind])) for row in rows]
            for kind in PLACEHOLDERS
        }
    frame = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    broken = broken_rules(MEDIA_SCHEMA if media else DOCUMENT_SCHEMA, frame)
    for number, row in enumerate(chunk):
        if isinstance(row, BadRow):
            yield row
        elif number in broken:
            yield BadRow(row.file, row.number, broken[number], make_excerpt(row.text))
        else:
            yield row


def _size(row: Row | BadRow) -> int:
    """Characters of the row's text, and bytes of its media."""
    if isinstance(row, BadRow):
        return 0
    media = [part for value in (row.images, row.audio) for part in media_values(value) or ()]
    return sum(map(len, media)) + (len(row.text) if isinstance(row.text, str) else 0)


def _placeholders(row: Row, kind: Kind) -> int:
    return row.text.count(PLACEHOLDERS[kind]) if isinstance(row.text, str) else 0


def broken_rules(schema: pa.DataFrameSchema, frame: pd.DataFrame) -> dict[int, str]:
    """The rows of a frame that break the schema, by their place, each with the first rule it breaks."""
    try:
        schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        found: dict[int, str] = {}
        for place, column, check in zip(cases["index"], cases["column"], cases["check"], strict=True):
            assert place is not None, f"the check {check!r} failed to run"
            found.setdefault(int(place), check.replace("value", column, 1))
        return found
    return {}
