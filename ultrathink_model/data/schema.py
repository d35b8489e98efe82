"""The schema of a document, checked over chunks of rows."""

from collections.abc import Iterable, Iterator

import pandas as pd
import pandera.pandas as pa

from ultrathink_model.data.document import BadRow, Row, make_excerpt

CHUNK_ROWS = 1024


def _is_utf8(text: object) -> bool:
    # JSON can spell half of a surrogate pair ("\ud800"), which is no character and has no UTF-8.
    return not isinstance(text, str) or text.isascii() or _encodes(text)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Each rule holds by itself for what another rule refuses, so that a row is quarantined for one reason.
DOCUMENT_SCHEMA = pa.DataFrameSchema(
    {
        "text": pa.Column(
            object,
            checks=[
                pa.Check(lambda text: isinstance(text, str), element_wise=True, name="text is a string"),
                pa.Check(
                    lambda text: not isinstance(text, str) or bool(text.strip()),
                    element_wise=True,
                    name="text is not empty",
                ),
                pa.Check(
                    lambda text: not isinstance(text, str) or "\0" not in text,
                    element_wise=True,
                    name="text has no NUL",
                ),
                pa.Check(_is_utf8, element_wise=True, name="text is Unicode"),
            ],
            nullable=True,
        )
    },
    strict=True,
)


def check_rows(rows: Iterable[Row | BadRow]) -> Iterator[str | BadRow]:
    """The texts of the rows that keep the schema, and the others as bad rows, in the order they came."""
    chunk: list[Row | BadRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield from _check_chunk(chunk)
            chunk = []
    if chunk:
        yield from _check_chunk(chunk)


def _check_chunk(chunk: list[Row | BadRow]) -> Iterator[str | BadRow]:
    values = [row.text if isinstance(row, Row) else "unread" for row in chunk]
    broken = broken_rules(DOCUMENT_SCHEMA, pd.DataFrame({"text": pd.Series(values, dtype=object)}))
    for number, row in enumerate(chunk):
        if isinstance(row, BadRow):
            yield row
        elif number in broken:
            yield BadRow(row.file, row.number, broken[number], make_excerpt(row.text))
        else:
            yield str(row.text)


def broken_rules(schema: pa.DataFrameSchema, frame: pd.DataFrame) -> dict[int, str]:
    """The rows of a frame that break the schema, by their place, each with the name of the first rule it breaks."""
    try:
        schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        found: dict[int, str] = {}
        for place, rule in zip(cases["index"].tolist(), cases["check"].tolist(), strict=True):
            found.setdefault(place, rule)
        return found
    return {}
