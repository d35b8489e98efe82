r"""Scored answers to prompts, from CSV files, as preference pairs.

    python -m ultrathink_model.data.scored_answers scores/*.csv --output pairs.jsonl \
      --prompt objective --answer assistant_response --score human_score --lower-is-better

Two answers to one prompt with different scores make a pair, with the difference as its margin. A score column stands
for all whose names begin so (`human_score_1`, `human_score_2`, …), of which the mean is taken.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ultrathink_model.data.preferences import PreferencePair
from ultrathink_model.errors import DataError, UltrathinkError


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer to a prompt, and the mean of what people gave it."""

    prompt: str
    answer: str
    score: float


def read_scored_answers(paths: Iterable[Path], prompt: str, answer: str, score: str) -> list[ScoredAnswer]:
    """The rows of CSV files, in order, the same answer to the same prompt once; lines that begin with # are comments.

    A row without any score, and one whose prompt or answer is blank, is passed over.

    Args:
        paths: The files.
        prompt: Column of the prompt.
        answer: Column of the answer.
        score: Beginning of the names of the columns with scores.

    Raises:
        DataError: A file cannot be read, a column is missing, or a score is no number.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for path in paths:
        for number, row in _rows(path, (prompt, answer)):
            columns = [name for name in row if name and name.startswith(score)]
            if not columns:
                raise DataError(f"{path} has no column {score}…; it has {', '.join(filter(None, row))}.")
            try:
                scores = [float(row[name]) for name in columns if row[name]]
            except ValueError as error:
                raise DataError(f"{path}: row {number}: {error}; {score}… must be numbers.") from None
            if scores and row[prompt].strip() and row[answer].strip():
                found.setdefault((row[prompt].strip(), row[answer].strip()), []).append(sum(scores) / len(scores))
    return [ScoredAnswer(*key, sum(scores) / len(scores)) for key, scores in found.items()]


def pairs_of_scores(answers: Sequence[ScoredAnswer], lower_is_better: bool) -> list[PreferencePair]:
    """Every two answers to one prompt whose scores differ; the margin is the difference."""
    by_prompt: dict[str, list[ScoredAnswer]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt, []).append(answer)
    pairs = []
    for prompt, group in by_prompt.items():
        for first, second in combinations(group, 2):
            if first.score == second.score:
                continue
            better, worse = (first, second) if (first.score > second.score) != lower_is_better else (second, first)
            margin = abs(first.score - second.score)
            pairs.append(PreferencePair(prompt=prompt, chosen=better.answer, rejected=worse.answer, margin=margin))
    return pairs


def _rows(path: Path, needed: tuple[str, ...]) -> Iterable[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; name a CSV file in UTF-8.") from None
    lines = text.splitlines(keepends=True)
    start = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    reader = csv.DictReader(lines[start:])
    missing = [name for name in needed if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(reader.fieldnames or ())}.")
    for row in reader:
        yield reader.line_num + start, {name: row[name] or "" for name in reader.fieldnames or ()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pairs of some CSV files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ultrathink_model.data.scored_answers", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file for rlhf.preference_data")
    parser.add_argument("--prompt", default="prompt", help="column of the prompt")
    parser.add_argument("--answer", default="answer", help="column of the answer")
    parser.add_argument("--score", default="score", help="beginning of the names of the score columns")
    parser.add_argument("--lower-is-better", action="store_true")
    options = parser.parse_args(arguments)
    try:
        answers = read_scored_answers(options.files, options.prompt, options.answer, options.score)
        pairs = pairs_of_scores(answers, options.lower_is_better)
    except UltrathinkError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    lines = [json.dumps(pair.model_dump(), ensure_ascii=False) for pair in pairs]
    options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    prompts = len({pair.prompt for pair in pairs})
    print(f"{len(pairs)} pairs of {prompts} prompts from {len(answers)} answers: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
