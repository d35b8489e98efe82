"""Packing: documents joined into one stream and cut into rows, so that every token is predicted exactly once.

The stored stream is t₁ … tₙ EOS for each document in turn. Row i takes as labels the tokens [i·S, (i+1)·S) of it, and
as input the same tokens one place later, so that the rows' labels are the stream, whole and without repetition. The
input at a document's first position is the EOS of the one before: it opens the document, belongs to it, and is all
that is seen when its first token is predicted. The sum of the labels' losses is thus the exact code length of the
documents, which a packing that leaves each document's first token unpredicted does not give.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from ultrathink_model.data.shards import TokenStream

IGNORED = -100


@dataclass
class Row:
    """One sequence of length S: what is seen, what is predicted, and the document of each position."""

    input_ids: Int64[np.ndarray, " seq"]
    labels: Int64[np.ndarray, " seq"]
    document_ids: Int32[np.ndarray, " seq"]


def count_sequences(tokens: int, sequence_length: int) -> int:
    """Rows that hold `tokens` tokens; the last may be ragged."""
    return -(-tokens // sequence_length)


def read_row(stream: TokenStream, index: int, sequence_length: int, eos_id: int, pad_id: int) -> Row:
    """Row `index` of the stream; a ragged last row is filled up with `pad_id`, its labels with -100."""
    start = index * sequence_length
    stop = min(start + sequence_length, len(stream))
    before = max(start - 1, 0)
    tokens, ends = stream.read(before, stop)
    labels = np.full(sequence_length, IGNORED, dtype=np.int64)
    labels[: stop - start] = tokens[start - before :]
    input_ids = np.full(sequence_length, pad_id, dtype=np.int64)
    input_ids[: stop - start] = tokens[: stop - start] if start else np.concatenate([[eos_id], tokens[:-1]])
    steps = np.zeros(sequence_length, dtype=np.int32)
    inside = ends - (start - before)
    # An end at the row's last token opens no document within it, nor does one where only padding follows.
    steps[inside[(inside > 0) & (inside < stop - start)]] = 1
    return Row(input_ids, labels, np.cumsum(steps, dtype=np.int32))


def padding_row(sequence_length: int, pad_id: int) -> Row:
    """A row that predicts nothing, for a rank that has none of its own left."""
    return Row(
        np.full(sequence_length, pad_id, dtype=np.int64),
        np.full(sequence_length, IGNORED, dtype=np.int64),
        np.zeros(sequence_length, dtype=np.int32),
    )
