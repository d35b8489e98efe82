"""What a model thinks of each token of a text: the log-probability it gave it, and its own favourite's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ultrathink_model.data.pack import IGNORED
from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.models.transformer import Transformer


@dataclass(frozen=True)
class TokenScores:
    """One number a token, zero where nothing was to be predicted.

    Attributes:
        nats: Negative log-probability of the token that came.
        confidence: Probability of the token that the model held likeliest.
        is_right: Whether that one came.
        counts: Where a token was to be predicted.
    """

    nats: Float[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]
    is_right: Bool[Tensor, "batch seq"]
    counts: Bool[Tensor, "batch seq"]


@torch.no_grad()
def score_tokens(
    model: Transformer,
    input_ids: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    document_ids: Int[Tensor, "batch seq"] | None = None,
    attention_mask: Bool[Tensor, "batch seq"] | None = None,
    media: MediaBatch | None = None,
) -> TokenScores:
    """Scores of the labels that are not -100; logits are held for `training.loss_chunk_size` tokens at a time.

    Args:
        model: The model, in evaluation mode.
        input_ids: Tokens, on the model's device.
        labels: Target of each position, already shifted.
        document_ids: As the model takes them.
        attention_mask: False at padding.
        media: Images and sounds that some of the tokens stand for.
    """
    hidden = model(
        input_ids, document_ids=document_ids, attention_mask=attention_mask, return_logits=False, media=media
    ).hidden
    size = model.config.training.loss_chunk_size
    parts = [
        _score(F.linear(states, model.output_weight).float(), targets)
        for states, targets in zip(hidden.flatten(0, 1).split(size), labels.flatten().split(size), strict=True)
    ]
    nats, confidence, top = (torch.cat(columns).view_as(labels) for columns in zip(*parts, strict=True))
    counts = labels != IGNORED
    return TokenScores(nats * counts, confidence * counts, (top == labels) & counts, counts)


def text_logprobs(model: Transformer, texts: Sequence[Sequence[int]], pad_id: int, batch_tokens: int) -> list[float]:
    """Log-probability in nats of each text's tokens after its first one, whatever their lengths.

    Args:
        model: The model, in evaluation mode.
        texts: Token ids; the first of each is what the others follow on. At most as many as the model reads.
        pad_id: Fills shorter rows on the right.
        batch_tokens: Tokens of one batch, padding included.
    """
    found = [0.0] * len(texts)
    for rows in _alike_in_length(texts, batch_tokens):
        longest = max(len(texts[row]) for row in rows)
        padded = [[*texts[row], *[pad_id] * (longest - len(texts[row]))] for row in rows]
        tokens = torch.tensor(padded, device=model.output_weight.device)
        lengths = torch.tensor([len(texts[row]) for row in rows], device=tokens.device)
        valid = torch.arange(longest, device=tokens.device) < lengths[:, None]
        labels = tokens[:, 1:].where(valid[:, 1:], IGNORED)
        nats = score_tokens(model, tokens[:, :-1], labels, attention_mask=valid[:, :-1]).nats
        for row, total in zip(rows, nats.double().sum(1).tolist(), strict=True):
            found[row] = -total
    return found


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.log_softmax(dim=-1)
    best, top = logprobs.max(dim=-1)
    nats = -logprobs.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    return nats, best.exp(), top


def _alike_in_length(texts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the texts of two tokens or more, shortest first: at most `batch_tokens` tokens a batch, or one text."""
    rows: list[int] = []
    long_enough = [row for row, text in enumerate(texts) if len(text) > 1]
    for row in sorted(long_enough, key=lambda row: len(texts[row])):
        if rows and (len(rows) + 1) * len(texts[row]) > batch_tokens:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
