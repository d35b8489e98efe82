"""Preference pairs: of two answers to one prompt, the chosen and the rejected one."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pandera.pandas as pa
from pydantic import BaseModel, ConfigDict

from ultrathink_model.data.document import BadRow, make_excerpt
from ultrathink_model.data.json_lines import read_json_lines
from ultrathink_model.data.schema import broken_rules, text_column
from ultrathink_model.errors import DataError

COLUMNS = ("prompt", "chosen", "rejected")
# Numbers that a row may have beside them, with what a row without them has.
NUMBERS = {"margin": 0.0, "weight": 1.0}
NAMED_RULES = 3


class PreferencePair(BaseModel):
    """A prompt with the answer that was preferred and the one that was not, as text.

    Attributes:
        prompt: The prompt.
        chosen: The answer that was preferred.
        rejected: The other one.
        margin: By how much it was preferred: what the scores of a reward model should differ by at least.
        weight: What the pair counts in the loss, against 1 for a plain pair.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0
    weight: float = 1.0


class Preferences(BaseModel):
    """Pairs split by prompt, and the rows that were refused."""

    model_config = ConfigDict(frozen=True)

    train: list[PreferencePair]
    heldout: list[PreferencePair]
    quarantined: list[dict[str, object]]


def _number_column() -> pa.Column:
    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf

    return pa.Column(object, checks=pa.Check(is_number, element_wise=True, name="value is a number from 0 on"))


PREFERENCE_SCHEMA = pa.DataFrameSchema(
    {**{name: text_column() for name in COLUMNS}, **{name: _number_column() for name in NUMBERS}},
    checks=[
        pa.Check(
            lambda frame: frame["chosen"].map(repr) != frame["rejected"].map(repr),
            name="chosen and rejected differ",
        )
    ],
    strict=True,
)


def load_preferences(path: str | Path, holdout_fraction: float, max_quarantine_fraction: float = 0.01) -> Preferences:
    """Reads a JSON Lines file of `prompt`, `chosen` and `rejected`, as text or as conversations, and holds out some prompts.

    A row may have a `margin` and a `weight`, numbers from 0 on; further columns are passed over. Pairs of one prompt stay on one side, so that held-out accuracy is on prompts
    never seen.

    Args:
        path: The file.
        holdout_fraction: Share of the prompts that is held out, above 0 and under 1; at least one is.
        max_quarantine_fraction: Share of rows that may break the schema.

    Raises:
        DataError: The file cannot be read, has too many bad rows, or has fewer than two prompts.
    """
    path = Path(path)
    pairs, bad, rows = _read_pairs(path)
    if not rows:
        raise DataError(f"rlhf.preference_data={path} is empty; it needs rows of {', '.join(COLUMNS)}.")
    if len(bad) > max_quarantine_fraction * rows:
        raise DataError(
            f"rlhf.preference_data={path}: {len(bad)} of {rows} rows ({len(bad) / rows:.1%}) break the schema, more than "
            f"data.max_quarantine_fraction={max_quarantine_fraction:g}. The commonest rules broken: {_commonest(bad)}. Mend "
            "the rows, or raise the fraction."
        )
    train, heldout = split_by_prompt(pairs, holdout_fraction)
    return Preferences(train=train, heldout=heldout, quarantined=[row.as_dict() for row in bad])


def split_by_prompt(
    pairs: Sequence[PreferencePair], holdout_fraction: float
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Divides pairs into training and held-out ones by their prompts.

    Prompts are ranked by their hash and the first of them held out: the order of the rows and any seed are without
    effect, and the share is exact to one prompt.

    Raises:
        DataError: There are fewer than two prompts.
    """
    ranked = sorted({pair.prompt for pair in pairs}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(ranked) < 2:
        raise DataError(
            f"the preference pairs have {len(ranked)} prompts; one to train on and one to hold out are needed."
        )
    count = min(max(round(len(ranked) * holdout_fraction), 1), len(ranked) - 1)
    held = set(ranked[:count])
    return [pair for pair in pairs if pair.prompt not in held], [pair for pair in pairs if pair.prompt in held]


def flatten_conversation(row: dict[str, object]) -> dict[str, object]:
    """A row of conversations as plain text: what both share is the prompt, what follows in each the answer.

    Conversations are lists of messages with `role` and `content`, as the hub's preference sets have them; the prompt may
    be a message list of its own, a string, or the beginning of both sides. A lone message of the user is the prompt
    as it stands; of several each is preceded by who speaks. Rows that are no conversations are given back as they are.
    """
    chosen, rejected = _messages(row.get("chosen")), _messages(row.get("rejected"))
    if chosen is None or rejected is None:
        return row
    prompt: object = row.get("prompt")
    if not isinstance(prompt, str):
        before = _messages(prompt) or []
        shared = 0
        # The last message of each side is its answer, even where they are equal.
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        # A side may repeat the prompt that the row names, or begin after it.
        prompt = _speak(before if before and chosen[: len(before)] != before else [])
        prompt = "\n\n".join(filter(None, [prompt, _speak(chosen[:shared])]))
        chosen, rejected = chosen[shared:], rejected[shared:]
    else:
        drop = [1 if len(side) > 1 and side[0] == ("user", prompt) else 0 for side in (chosen, rejected)]
        chosen, rejected = chosen[drop[0] :], rejected[drop[1] :]
    return row | {"prompt": prompt, "chosen": _speak(chosen), "rejected": _speak(rejected)}


def _messages(value: object) -> list[tuple[str, str]] | None:
    """Who says what, or None where a value is no list of messages."""
    if not isinstance(value, list) or not value:
        return None
    found = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        found.append((role, content))
    return found


def _speak(messages: Sequence[tuple[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in messages)


def _read_pairs(path: Path) -> tuple[list[PreferencePair], list[BadRow], int]:
    numbers: list[int] = []
    values: list[dict[str, object]] = []
    bad: list[BadRow] = []
    for item in read_json_lines(path, path.name):
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        number, row = item[0], flatten_conversation(item[1])
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            bad.append(BadRow(path.name, number, f"row has the column {missing[0]!r}", make_excerpt(row)))
        else:
            numbers.append(number)
            values.append(
                {name: row[name] for name in COLUMNS} | {name: row.get(name, NUMBERS[name]) for name in NUMBERS}
            )
    rows = len(values) + len(bad)
    frame = pd.DataFrame(
        {name: pd.Series([row[name] for row in values], dtype=object) for name in PREFERENCE_SCHEMA.columns}
    )
    broken = broken_rules(PREFERENCE_SCHEMA, frame) if values else {}
    bad += [BadRow(path.name, numbers[at], rule, make_excerpt(values[at])) for at, rule in broken.items()]
    pairs = [PreferencePair.model_validate(row) for at, row in enumerate(values) if at not in broken]
    return pairs, sorted(bad, key=lambda row: row.row), rows


def _commonest(bad: list[BadRow]) -> str:
    first = {row.rule: row.row for row in reversed(bad)}
    counts = Counter(row.rule for row in bad)
    return "; ".join(f"{rule}: {count}, as in row {first[rule]}" for rule, count in counts.most_common(NAMED_RULES))
