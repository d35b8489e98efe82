import json

import pytest

from ultrathink_model.data.preferences import PreferencePair, load_preferences, split_by_prompt
from ultrathink_model.errors import DataError


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def pair(number, **values):
    return {"prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad {number}"} | values


def test_pairs_are_split_by_prompt_whatever_their_order(tmp_path):
    rows = [pair(number % 20, chosen=f"good {number}") for number in range(60)]
    first = load_preferences(write(tmp_path / "a.jsonl", rows), 0.2)
    second = load_preferences(write(tmp_path / "b.jsonl", rows[::-1]), 0.2)
    assert len(first.train) + len(first.heldout) == 60
    held = {row.prompt for row in first.heldout}
    assert len(held) == 4
    assert held.isdisjoint(row.prompt for row in first.train)
    assert held == {row.prompt for row in second.heldout}


def test_columns_beside_the_three_are_passed_over(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(number, source="human", score=3) for number in range(3)])
    assert load_preferences(path, 0.5).train[0].prompt.startswith("question")


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("not json", "row is JSON"),
        ("[1]", "row is a JSON object"),
        ({"prompt": "a", "chosen": "b"}, "row has the column 'rejected'"),
        (pair(0, chosen=["b"]), "chosen is a string"),
        (pair(0, prompt=None), "prompt is a string"),
        (pair(0, chosen="a\0b"), "chosen has no NUL"),
        (pair(0, prompt="\ud800"), "row is Unicode"),
        (pair(0, rejected="  "), "rejected is not empty"),
        (pair(0, chosen="same", rejected="same"), "chosen and rejected differ"),
    ],
)
def test_a_bad_row_is_quarantined_or_refused_with_its_rule(tmp_path, row, rule):
    path = write(tmp_path / "a.jsonl", [pair(1), row, pair(2), pair(3)])
    kept = load_preferences(path, 0.3, max_quarantine_fraction=0.25)
    assert [(bad["row"], bad["rule"]) for bad in kept.quarantined] == [(2, rule)]
    assert len(kept.train) + len(kept.heldout) == 3
    with pytest.raises(DataError, match=r"1 of 4 rows \(25\.0%\) break the schema") as refused:
        load_preferences(path, 0.3)
    assert f"{rule}: 1, as in row 2" in str(refused.value)


def test_files_without_pairs_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load_preferences(tmp_path / "none.jsonl", 0.2)
    with pytest.raises(DataError, match="is empty"):
        load_preferences(write(tmp_path / "empty.jsonl", []), 0.2)
    with pytest.raises(DataError, match="1 prompts; one to train on and one to hold out"):
        load_preferences(write(tmp_path / "one.jsonl", [pair(1), pair(1)]), 0.2)


def test_at_least_one_prompt_is_on_each_side():
    pairs = [PreferencePair(**pair(number)) for number in range(3)]
    for fraction in (0.01, 0.99):
        train, heldout = split_by_prompt(pairs, fraction)
        assert train
        assert heldout


def test_margins_and_weights_are_read_and_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(1, margin=0.5, weight=2), pair(2)])
    read = load_preferences(path, 0.5)
    assert {(row.margin, row.weight) for row in (*read.train, *read.heldout)} == {(0.5, 2.0), (0.0, 1.0)}
    for bad in ({"margin": -1}, {"weight": "2"}, {"margin": True}):
        path = write(tmp_path / "b.jsonl", [pair(1, **bad), pair(2), pair(3)])
        found = load_preferences(path, 0.5, max_quarantine_fraction=0.5)
        assert [row["rule"] for row in found.quarantined] == [f"{next(iter(bad))} is a number from 0 on"]


USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "why?"), ("assistant", "so"), ("assistant", "no"))
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, ("why?", "so", "no")),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, ("why?", "so", "no")),
        ({"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, ("why?", "so", "no")),
        ({"prompt": "why?", "chosen": [USER, YES], "rejected": [USER, NO]}, ("why?", "so", "no")),
        ({"prompt": "why?", "chosen": [YES], "rejected": [NO]}, ("why?", "so", "no")),
        (
            {"chosen": [USER, NO, USER, YES], "rejected": [USER, NO, USER, NO]},
            ("User: why?\n\nAssistant: no\n\nUser: why?", "so", "no"),
        ),
        (
            {"chosen": [USER, YES], "rejected": [USER, NO, USER, YES]},
            ("why?", "so", "Assistant: no\n\nUser: why?\n\nAssistant: so"),
        ),
    ],
)
def test_conversations_become_a_prompt_and_two_answers(tmp_path, row, expected):
    path = write(tmp_path / "a.jsonl", [row, pair(1)])
    kept = load_preferences(path, 0.5)
    assert kept.quarantined == []
    found = {(each.prompt, each.chosen, each.rejected) for each in [*kept.train, *kept.heldout]}
    assert expected in found


@pytest.mark.parametrize("side", [[], [{"role": "user"}], ["text"], [{"role": 1, "content": "x"}]])
def test_broken_conversations_are_quarantined(tmp_path, side):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": side, "rejected": [NO]}, pair(1), pair(2)])
    kept = load_preferences(path, 0.5, max_quarantine_fraction=0.5)
    assert [bad["rule"] for bad in kept.quarantined] == ["chosen is a string"]
