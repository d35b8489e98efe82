"""Masking of personal data: what is written like an address or a number and, where it has a checksum, keeps it."""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ultrathink_model.data.cleaning import checksums


@dataclass(frozen=True)
class Kind:
    """One way to write one kind of personal data.

    `holds` decides on what the pattern found; a group named `value` is what is masked, else the whole match.
    """

    mask: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = lambda found: True


def _is_address(found: str) -> bool:
    try:
        ipaddress.ip_address(found)
    except ValueError:
        return False
    # "::" and "a::" are addresses too, but stand for other things more often.
    return "." in found or len([group for group in found.split(":") if group]) >= 3


def _is_phone(found: str) -> bool:
    return 7 <= len(checksums.digits(found)) <= 15 and not re.search(r"\d{4}[-/]\d{2}[-/]\d{2}", found)


_CODE = r"(?<![\w-])"
_END = r"(?![\w-])"
KINDS = (
    Kind(
        "<EMAIL>",
        re.compile(r"(?<![\w.+%-])[\w.+%'-]{1,64}@(?:[\w](?:[\w-]{0,62})\.){1,8}[^\W\d_]{2,24}(?![\w-])"),
        lambda found: not found.startswith((".", "-", "'")),
    ),
    Kind(
        "<ID>",
        re.compile(_CODE + r"[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?" + _END),
        checksums.is_iban,
    ),
    Kind(
        "<PHONE>",
        re.compile(r"(?<![\w+])(?:\+|00)[1-9]\d{0,2}(?:[ .\-/]?\(\d{1,4}\))?(?:[ .\-/]?\d){5,12}(?![\d-])"),
        _is_phone,
    ),
    Kind("<CARD>", re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![ -]?\d)"), checksums.is_card),
    Kind("<ID>", re.compile(_CODE + r"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}" + _END)),  # US social security
    Kind("<ID>", re.compile(_CODE + r"\d{3}\.\d{3}\.\d{3}-\d{2}" + _END), checksums.is_cpf),
    Kind("<ID>", re.compile(_CODE + r"(?:\d{8}|[XYZ]\d{7})-?[A-Z]" + _END), checksums.is_dni),
    Kind("<ID>", re.compile(_CODE + r"[12] ?\d\d ?\d\d ?\d\d ?\d{3} ?\d{3} ?\d\d" + _END), checksums.is_nir),
    Kind("<ID>", re.compile(_CODE + r"[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]" + _END), checksums.is_codice),
    Kind("<ID>", re.compile(_CODE + r"\d{3} \d{3} \d{4}" + _END), checksums.is_nhs),
    Kind("<ID>", re.compile(_CODE + r"\d{11}" + _END), checksums.is_pesel),
    Kind("<ID>", re.compile(r"(?i:\bbsn\b)\D{1,12}(?P<value>\d{9})" + _END), checksums.is_bsn),
    Kind("<IP>", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)"), _is_address),
    Kind("<IP>", re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"), _is_address),
    Kind(
        "<PHONE>", re.compile(r"(?<![\w.$-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?![\d-])")
    ),
    Kind(
        "<PHONE>",
        re.compile(r"(?<![\w.,$-])\(?0\d{1,4}\)?(?: ?[/-] ?| )\d{2,6}(?:[ -]?\d{1,4}){1,4}(?![\d-]|,\d)"),
        lambda found: _is_phone(found) and len(checksums.digits(found)) >= 9,
    ),
    Kind(
        "<PHONE>",
        re.compile(
            r"(?i:(?<!<)\b(?:tel|phone|telephone|mobile|cell|fax|call|whatsapp|sms)\b)[^\d\n+]{1,12}"
            r"(?P<value>\+?\(?\d[\d .()/-]{5,16}\d)(?!\d)"
        ),
        _is_phone,
    ),
)


# Where to look: around an @, around seven digits or more that stand close together, around colons as IPv6 has them, and
# around four short numbers with points. Prose has few such places, and the patterns above are slow on the rest.
_PLACES = (
    re.compile(r"@"),
    re.compile(r"\d(?:[^\n\d]{0,12}\d){6,}"),
    re.compile(r"[0-9A-Fa-f]?:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]*"),
    re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d"),
)
_MARGIN = 80


def mask_pii(text: str) -> tuple[str, Counter[str]]:
    """The text with a mask in the place of each find, and how often each mask was put."""
    counts: Counter[str] = Counter()
    parts, last = [], 0
    for start, end in _windows(text):
        parts += [text[last:start], _mask_all(text[start:end], counts)]
        last = end
    return "".join([*parts, text[last:]]), counts


def _windows(text: str) -> list[tuple[int, int]]:
    """The stretches of a text that may hold a find, apart from each other and with words uncut at their ends."""
    found = sorted((match.start(), match.end()) for place in _PLACES for match in place.finditer(text))
    windows: list[tuple[int, int]] = []
    for first, last in found:
        start = max(text.rfind(" ", 0, max(first - _MARGIN, 0)), text.rfind("\n", 0, max(first - _MARGIN, 0))) + 1
        end = text.find(" ", last + _MARGIN)
        end = len(text) if end < 0 else end
        if windows and start <= windows[-1][1]:
            windows[-1] = (windows[-1][0], max(windows[-1][1], end))
        else:
            windows.append((start, end))
    return windows


def _mask_all(text: str, counts: Counter[str]) -> str:
    for kind in KINDS:

        def put(match: re.Match[str], kind: Kind = kind) -> str:
            group = "value" if "value" in match.re.groupindex else 0
            if not kind.holds(match[group]):
                return match[0]
            counts[kind.mask] += 1
            start, end = match.start(group) - match.start(), match.end(group) - match.start()
            return match[0][:start] + kind.mask + match[0][end:]

        text = kind.pattern.sub(put, text)
    return text
