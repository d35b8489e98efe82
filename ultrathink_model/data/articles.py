"""Joining lines into articles, for datasets whose rows or files are lines of many articles."""

import re
from collections.abc import Iterable, Iterator

from ultrathink_model.data.document import BadRow, Row


def join_articles(rows: Iterable[Row | BadRow], heading: str) -> Iterator[Row | BadRow]:
    """Makes one row of each article: a line that matches `heading`, and all lines up to the next one.

    Rows may be lines or whole files. A joined row has the number of its first line. What stands before the first
    heading is an article too, unless it is blank; rows that hold no text pass as they are.
    """
    pattern = re.compile(heading)
    lines: list[str] = []
    place = ("", 0)
    for row in rows:
        if isinstance(row, BadRow) or not isinstance(row.text, str):
            yield row
            continue
        for offset, line in enumerate(row.text.splitlines(keepends=True)):
            if pattern.match(line) or row.file != place[0]:
                yield from _finish(place, lines)
                lines, place = [], (row.file, row.number + offset)
            lines.append(line)
    yield from _finish(place, lines)


def _finish(place: tuple[str, int], lines: list[str]) -> Iterator[Row]:
    text = "".join(lines)
    if text.strip():
        yield Row(*place, text)
