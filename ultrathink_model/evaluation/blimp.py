"""BLiMP (Warstadt et al. 2020): minimal pairs whose grammatical sentence a model should find the likelier one."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.errors import DataError
from ultrathink_model.evaluation.scoring import text_logprobs
from ultrathink_model.models.transformer import Transformer


class MinimalPair(NamedTuple):
    """Two sentences that differ in one point of grammar."""

    good: str
    bad: str


def read_blimp(folder: Path, pairs: int | None) -> dict[str, list[MinimalPair]]:
    """The pairs of each paradigm, by the name of its file.

    Args:
        folder: Holds BLiMP's `<paradigm>.jsonl` files; they may lie in a folder `data` in it.
        pairs: Pairs taken of each, the first ones; None takes all.

    Raises:
        DataError: There are no such files, or a line is no pair.
    """
    files = sorted(folder.glob("*.jsonl")) or sorted((folder / "data").glob("*.jsonl"))
    if not files:
        raise DataError(
            f"evaluation.blimp={folder} holds no .jsonl files; name the folder `data` of BLiMP's repository."
        )
    return {file.stem: _read_paradigm(file, pairs) for file in files}


def blimp_metrics(
    model: Transformer, tokenizer: Tokenizer, folder: Path, pairs: int | None, batch_size: int
) -> dict[str, float]:
    """Share of pairs whose good sentence is likelier: `eval/blimp/accuracy` over all, and one for each paradigm.

    A sentence's probability is that of all its tokens after the token that opens a document, as in lm-eval; equal
    probabilities count as a miss.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        folder: BLiMP.
        pairs: Pairs of each paradigm; None takes all.
        batch_size: Sequences of `model.max_seq_length` tokens that make a batch.

    Raises:
        DataError: See `read_blimp`.
    """
    paradigms = read_blimp(folder, pairs)
    length = model.config.model.max_seq_length
    sentences = [sentence for found in paradigms.values() for pair in found for sentence in pair]
    texts = [[tokenizer.bos_id, *ids][: length + 1] for ids in tokenizer.encode_batch(sentences)]
    scores = np.array(text_logprobs(model, texts, tokenizer.pad_id, batch_size * length)).reshape(-1, 2)
    hits = scores[:, 0] > scores[:, 1]
    ends = np.cumsum([len(found) for found in paradigms.values()])
    metrics = _accuracy("blimp", hits)
    for name, own in zip(paradigms, np.split(hits, ends[:-1]), strict=True):
        metrics |= _accuracy(f"blimp_{name}", own)
    return metrics


def _accuracy(task: str, hits: Bool[np.ndarray, " pairs"]) -> dict[str, float]:
    stderr = float(hits.std(ddof=1) / math.sqrt(len(hits))) if len(hits) > 1 else math.nan
    return {f"eval/{task}/accuracy": float(hits.mean()), f"eval/{task}/accuracy_stderr": stderr}


def _read_paradigm(file: Path, pairs: int | None) -> list[MinimalPair]:
    found: list[MinimalPair] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(itertools.islice(lines, pairs), start=1):
            try:
                row = json.loads(line)
                found.append(MinimalPair(row["sentence_good"], row["sentence_bad"]))
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"evaluation.blimp: line {number} of {file} is no minimal pair; each line is JSON with sentence_good "
                    "and sentence_bad."
                ) from None
    if not found:
        raise DataError(f"evaluation.blimp: {file} is empty; remove it, or get BLiMP's files again.")
    return found
