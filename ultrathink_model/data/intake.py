"""Intake: a source's rows checked against the schema, the bad ones quarantined, the good ones split."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pydantic import BaseModel

from ultrathink_model.config.data import DataConfig
from ultrathink_model.data.document import BadRow, Document, Medium, Row, Split, make_excerpt
from ultrathink_model.data.hub import StreamPlace
from ultrathink_model.data.media_store import MediaWriter
from ultrathink_model.data.media_values import COLUMNS, find_medium, media_values
from ultrathink_model.data.schema import check_rows
from ultrathink_model.data.sources import ResumableSource, Source
from ultrathink_model.errors import DataError, MediaError
from ultrathink_model.media.placeholders import PLACEHOLDERS, cut_at_placeholders

NAMED_RULES = 3
SPLITS: tuple[Split, ...] = ("train", "validation")

Found = tuple[Row, tuple[Medium, ...]]
"""A row that keeps the rules, and its media in the order of their placeholders."""


class IntakeState(BaseModel):
    """How far an intake is: what it has read and refused up to the document that it gave last.

    Attributes:
        place: Where the source goes on.
        split: The split that is being read.
        rows: Rows read, of all splits.
        kept: Rows of this split that keep the rules.
        seen: Documents given, by split.
        rules: Rows that broke each rule.
        examples: The first of each.
        quarantine_bytes: Size of the quarantine file.
    """

    place: StreamPlace
    split: Split
    rows: int
    kept: int
    seen: dict[Split, int]
    rules: dict[str, int]
    examples: dict[str, BadRow]
    quarantine_bytes: int


class Intake:
    """One reading of a source: its documents with their splits, and the count of what was refused.

    Args:
        source: Where the rows come from.
        data: `validation_every` and `max_quarantine_fraction`.
        quarantine_file: Where refused rows are added, a JSON line each; None only counts them.
        media: Where the images and sounds that rows name are put; None reads text alone.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        quarantine_file: Path | None = None,
        media: MediaWriter | None = None,
    ) -> None:
        self._source, self._data, self._quarantine_file = source, data, quarantine_file
        self.media = media
        self.name, self.streaming = source.name, source.streaming
        self.rows = 0
        self.train_full = False
        """Set by the reader when it needs no more training documents of a source that streams."""
        self._rules: Counter[str] = Counter()
        self._examples: dict[str, BadRow] = {}
        self._seen: Counter[Split] = Counter()
        self._start: IntakeState | None = None
        # Of the split that is being read: which it is, its rows read, and those that keep the rules.
        self._split, self._read, self._kept = SPLITS[0], 0, 0

    def state(self) -> IntakeState | None:
        """How far the reading is; None where it can only be begun anew.

        To be asked between two documents. Not all documents have been given yet while the first ones are held back to
        choose the held-out one of them.
        """
        is_settled = self._source.has_validation or self._data.validation_every <= self._kept == self._seen.total()
        if not isinstance(self._source, ResumableSource) or self.media is not None or not is_settled:
            return None
        place = self._source.place(self._read)
        if place is None:
            return None
        return IntakeState(
            place=place,
            split=self._split,
            rows=self.rows,
            kept=self._kept,
            seen=dict(self._seen),
            rules=dict(self._rules),
            examples=self._examples,
            quarantine_bytes=self._quarantine_size(),
        )

    def go_on(self, state: IntakeState) -> None:
        """Has `documents` give those that follow the state."""
        self._start, self.rows = state, state.rows
        self._seen, self._rules, self._examples = Counter(state.seen), Counter(state.rules), state.examples

    def sync(self) -> None:
        """Forces the bad rows to the disk."""
        if self._quarantine_size():
            with self._quarantine_file.open("rb") as file:  # type: ignore[union-attr]
                os.fsync(file.fileno())

    def _quarantine_size(self) -> int:
        file = self._quarantine_file
        return file.stat().st_size if file is not None and file.is_file() else 0

    @property
    def quarantined(self) -> int:
        """Rows that broke a rule so far."""
        return self._rules.total()

    def documents(self) -> Iterator[Document]:
        """The documents in the source's order.

        Raises:
            DataError: A split is empty, or more rows than `data.max_quarantine_fraction` were refused.
        """
        seen = self._seen
        for document in self._split_documents():
            seen[document.split] += 1
            yield document
        if not seen:
            rules = f", for these rules: {self._commonest_rules()}" if self.quarantined else ""
            raise DataError(
                f"data.dataset={self.name} is empty: none of its {self.rows} rows is a document{rules}. Give it text."
            )
        self._check_quarantine()
        if not seen["train"] or not seen["validation"]:
            raise DataError(
                f"data.dataset={self.name} has {seen['train']} training and {seen['validation']} validation "
                "documents, and both are needed; give it more text."
            )

    def _split_documents(self) -> Iterator[Document]:
        if self._source.has_validation:
            for split in SPLITS[SPLITS.index(self._start.split) if self._start else 0 :]:
                for found in self._rows(split):
                    yield _document(split, found)
        else:
            kept = self._start.kept if self._start else 0
            yield from hold_out(self._rows("train"), self._data.validation_every, kept)

    def _rows(self, split: Split) -> Iterator[Found]:
        self._split, self._read, self._kept = split, 0, 0
        if self._start is not None and self._start.split == split and isinstance(self._source, ResumableSource):
            self._read, self._kept = self._start.place.row, self._start.kept
            rows = self._source.rows(split, self._start.place)
        else:
            rows = self._source.rows(split)
        for item in check_rows(rows, media=self.media is not None):
            if split == "train" and self.train_full:
                return
            self.rows += 1
            self._read += 1
            found = item if isinstance(item, BadRow) else self._with_media(item)
            if isinstance(found, BadRow):
                self._quarantine(found)
            else:
                self._kept += 1
                yield found

    def _with_media(self, row: Row) -> Found | BadRow:
        """The row with its media stored, or the rule that one of them breaks."""
        if self.media is None:
            return row, ()
        values = {kind: iter(media_values(getattr(row, COLUMNS[kind])) or ()) for kind in PLACEHOLDERS}
        media = []
        try:
            for kind in cut_at_placeholders(str(row.text))[1]:
                value = next(values[kind])
                source = value if isinstance(value, bytes) else find_medium(value, self._source.folder, row.file)
                media.append(self.media.add(kind, source))
        except MediaError as error:
            return BadRow(row.file, row.number, error.rule, make_excerpt(error.found))
        return row, tuple(media)

    def _quarantine(self, row: BadRow) -> None:
        self._rules[row.rule] += 1
        self._examples.setdefault(row.rule, row)
        if self._quarantine_file is not None:
            with self._quarantine_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"source": self.name} | row.as_dict(), ensure_ascii=False) + "\n")

    def _check_quarantine(self) -> None:
        limit = self._data.max_quarantine_fraction
        if self.quarantined <= limit * self.rows:
            return
        raise DataError(
            f"data.dataset={self.name}: {self.quarantined} of {self.rows} rows "
            f"({self.quarantined / self.rows:.1%}) break the schema, more than data.max_quarantine_fraction={limit:g}. "
            f"The commonest rules broken: {self._commonest_rules()}. Mend the rows, name the text's column "
            "(data.text_column), or raise the fraction."
        )

    def _commonest_rules(self) -> str:
        return "; ".join(
            f"{rule}: {count} rows, as in {self._examples[rule].file} row {self._examples[rule].row}: "
            f"{self._examples[rule].excerpt!r}"
            for rule, count in self._rules.most_common(NAMED_RULES)
        )


def hold_out(rows: Iterator[Found], every: int, kept: int = 0) -> Iterator[Document]:
    """Holds out every n-th document: of fewer than n the last one, and of a lone document its last n-th part.

    By index and not at random: a source of n documents or more keeps its split as it grows, and any tool can repeat it.
    `kept` documents, none or at least n, came before `rows`.
    """
    first = list(islice(rows, every)) if not kept else []
    if len(first) == 1 and not first[0][1]:
        yield from _cut_in_two(first[0][0], every)
        return
    for number, found in enumerate(first, start=1):
        yield _document("validation" if number == len(first) else "train", found)
    for number, found in enumerate(rows, start=kept + 1):
        yield _document("train" if number % every else "validation", found)


def _cut_in_two(row: Row, every: int) -> Iterator[Document]:
    """Cuts at the last line's end before the held-out part, or between words, or anywhere."""
    text = str(row.text)
    place = len(text) - len(text) // every
    for mark in ("\n", " "):
        at = text.rfind(mark, place // 2, place)
        if at >= 0:
            place = at + 1
            break
    yield Document("train", text[:place], row.file, row.number)
    if text[place:].strip():
        yield Document("validation", text[place:], row.file, row.number)


def _document(split: Split, found: Found) -> Document:
    row, media = found
    return Document(split, str(row.text), row.file, row.number, media)
