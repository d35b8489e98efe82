"""The schema of a document, checked over chunks of rows."""

from collections.abc import Callable, Iterable, Iterator

import pandas as pd
import pandera.pandas as pa

from ultrathink_model.data.document import BadRow, Row, make_excerpt

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


DOCUMENT_SCHEMA = pa.DataFrameSchema({"text": text_column()}, strict=True)


def check_rows(rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
    """The rows that keep the schema as they are, and the others as bad rows, in the order they came."""
    chunk: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.text) if isinstance(row, Row) and isinstance(row.text, str) else 0
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield from _check_chunk(chunk)
            chunk, characters = [], 0
    if chunk:
        yield from _check_chunk(chunk)


def _check_chunk(chunk: list[Row | BadRow]) -> Iterator[Row | BadRow]:
    values = [row.text if isinstance(row, Row) else "unread" for row in chunk]
    broken = broken_rules(DOCUMENT_SCHEMA, pd.DataFrame({"text": pd.Series(values, dtype=object)}))
    for number, row in enumerate(chunk):
        if isinstance(row, BadRow):
            yield row
        elif number in broken:
            yield BadRow(row.file, row.number, broken[number], make_excerpt(row.text))
        else:
            yield row


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
