"""What stands for an image or a sound in a text, and the two kinds of media in the order that they are numbered in."""

import re
from typing import Literal

Kind = Literal["image", "audio"]

KINDS: tuple[Kind, ...] = ("image", "audio")
PLACEHOLDERS: dict[Kind, str] = {"image": "<image>", "audio": "<audio>"}
MEDIA_TOKENS = tuple(PLACEHOLDERS.values())

_PATTERN = re.compile("(" + "|".join(map(re.escape, MEDIA_TOKENS)) + ")")


def cut_at_placeholders(text: str) -> tuple[list[str], list[Kind]]:
    """The pieces of text around the placeholders, one more than there are of those, and the placeholders' kinds."""
    parts = _PATTERN.split(text)
    kinds: dict[str, Kind] = {token: kind for kind, token in PLACEHOLDERS.items()}
    return parts[::2], [kinds[token] for token in parts[1::2]]
