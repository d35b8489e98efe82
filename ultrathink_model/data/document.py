"""What a source yields: rows as they are read, documents that keep the schema, and rows that do not."""

from dataclasses import asdict, dataclass
from typing import Literal

from ultrathink_model.media.placeholders import Kind

Split = Literal["train", "validation"]

EXCERPT_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: where it stood, and whatever its columns held."""

    file: str
    number: int
    text: object
    images: object = None
    audio: object = None


@dataclass(frozen=True, slots=True)
class Medium:
    """An image or a sound of a document: its number in the media store, and the tokens that it takes."""

    kind: Kind
    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Document:
    """A row that keeps the schema, or a part of one, with the split that it belongs to.

    `media` are in the order of their placeholders in `text`.
    """

    split: Split
    text: str
    file: str
    row: int
    media: tuple[Medium, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that breaks a rule: kept in `quarantine.jsonl`, not trained on."""

    file: str
    row: int
    rule: str
    excerpt: str

    def as_dict(self) -> dict[str, object]:
        """The line of `quarantine.jsonl`."""
        return asdict(self)


def make_excerpt(value: object) -> str:
    """The beginning of a value, short enough to be read and safe to be printed."""
    text = value if isinstance(value, str) else repr(value)
    cut = text[:EXCERPT_LENGTH].encode("utf-8", "replace").decode()
    return cut + ("…" if len(text) > EXCERPT_LENGTH else "")
