"""Unigram and bigram models of a prepared data set: the baselines a language model must beat to have learnt anything.

Both are counted on the training split and scored on the tokens that the validation loader makes a model predict:
every token of every document and the end-of-text token after it, a document's first token being predicted from the
end-of-text token before it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ultrathink_model.data.manifest import DataManifest, Split
from ultrathink_model.data.shards import TokenStream
from ultrathink_model.evaluation.perplexity import ValidationLoss

Tokens = NDArray[np.int64]
Floats = NDArray[np.float64]

# Tokens whose bigrams are sorted at once: 16 M of them take about 0.5 GB while they are.
CHUNK_TOKENS = 2**24


@dataclass(frozen=True)
class BigramCounts:
    """How often each bigram of a text occurs.

    Attributes:
        keys: `previous * vocab_size + token` of each bigram that occurs, rising; shape (bigrams,).
        counts: Its occurrences; shape (bigrams,).
        vocab_size: Number of different tokens there could be.
    """

    keys: Tokens
    counts: Tokens
    vocab_size: int

    @property
    def previous(self) -> Tokens:
        """First token of each bigram."""
        return self.keys // self.vocab_size

    @property
    def tokens(self) -> Tokens:
        """Second token of each bigram."""
        return self.keys % self.vocab_size


def count_bigrams(pairs: Iterable[tuple[Tokens, Tokens]], vocab_size: int) -> BigramCounts:
    """Counts bigrams given as pieces of (previous tokens, tokens that follow them), each of shape (n,)."""
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for previous, tokens in pairs:
        more_keys, more_counts = np.unique(previous * vocab_size + tokens, return_counts=True)
        keys, where = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, more_counts]), minlength=keys.size).astype(np.int64)
    return BigramCounts(keys, counts, vocab_size)


class Unigram:
    """Tokens by frequency: absolute discounting, with what is taken spread evenly over the vocabulary."""

    def __init__(self, counts: BigramCounts) -> None:
        frequencies = np.bincount(counts.tokens, counts.counts, minlength=counts.vocab_size)
        self._log_probabilities = np.log(_discounted(frequencies))

    def logprobs(self, previous: Tokens, tokens: Tokens) -> Floats:
        """Log-probability in nats of each token; `previous` has no say."""
        return self._log_probabilities[tokens]


class KneserNeyBigram:
    """Interpolated Kneser–Ney bigram (Kneser and Ney 1995; Chen and Goodman 1999, §2.7) with one discount.

    p(w | v) = max(c(vw) − D, 0) / c(v) + D · N(v·) / c(v) · p(w), where N(v·) counts the different tokens seen after
    v, and p(w) is the share of different contexts that w was seen in, itself discounted and interpolated with the
    uniform distribution, so that no token has probability zero. After a token never seen, p(w | v) = p(w).
    """

    def __init__(self, counts: BigramCounts) -> None:
        size = counts.vocab_size
        self._counts = counts
        self._discount = _discount(counts.counts)
        self._continuation = _discounted(np.bincount(counts.tokens, minlength=size))
        totals = np.bincount(counts.previous, counts.counts, minlength=size)
        types = np.bincount(counts.previous, minlength=size)
        self._scale = 1 / np.maximum(totals, 1)
        self._backoff = np.where(totals > 0, self._discount * types * self._scale, 1.0)

    def logprobs(self, previous: Tokens, tokens: Tokens) -> Floats:
        """Log-probability in nats of each token after its previous one; all of shape (n,)."""
        keys = previous * self._counts.vocab_size + tokens
        place = np.minimum(np.searchsorted(self._counts.keys, keys), self._counts.keys.size - 1)
        seen = self._counts.keys[place] == keys
        discounted = np.where(seen, self._counts.counts[place] - self._discount, 0.0)
        return np.log(discounted * self._scale[previous] + self._backoff[previous] * self._continuation[tokens])


def baseline_losses(manifest: DataManifest) -> dict[str, ValidationLoss]:
    """Loss on the validation split of a `unigram` and a `bigram` model counted on the training split."""
    counts = count_bigrams(split_bigrams(manifest, "train"), manifest.vocab_size)
    return {
        name: split_loss(model, manifest)
        for name, model in (("unigram", Unigram(counts)), ("bigram", KneserNeyBigram(counts)))
    }


def split_loss(model: Unigram | KneserNeyBigram, manifest: DataManifest) -> ValidationLoss:
    """Mean nats per token of the validation split under `model`."""
    nats, count = 0.0, 0
    for previous, tokens in split_bigrams(manifest, "validation"):
        nats -= float(model.logprobs(previous, tokens).sum())
        count += tokens.size
    return ValidationLoss(nats / count, count)


def split_bigrams(manifest: DataManifest, split: Split) -> Iterator[tuple[Tokens, Tokens]]:
    """Every token that a pass over the split predicts, in pieces: the tokens before them, and the tokens themselves.

    The tokens of images and sounds stand before others, but are not predicted.
    """
    media = list(manifest.media.token_ids.values()) if manifest.media else []
    for source in manifest.sources:
        stream = TokenStream(manifest.path, source.shards[split], manifest.token_dtype)
        last = manifest.eos_id
        for start in range(0, len(stream), CHUNK_TOKENS):
            tokens, _ = stream.read(start, min(start + CHUNK_TOKENS, len(stream)))
            previous, predicted = np.concatenate([[last], tokens[:-1]]), ~np.isin(tokens, media)
            yield previous[predicted], tokens[predicted]
            last = int(tokens[-1])


def _discount(counts: Tokens | Floats) -> float:
    """The discount n₁ / (n₁ + 2 n₂) of Ney et al. 1994, kept off 0 and 1 where a count of counts is zero."""
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    return (ones + 0.5) / (ones + 2 * twos + 1)


def _discounted(counts: Tokens | Floats) -> Floats:
    """Relative frequencies, discounted, with the freed mass spread evenly over all; shape (vocab,), sums to 1."""
    discount = _discount(counts)
    freed = discount * (counts > 0).sum() / counts.sum()
    return np.maximum(counts - discount, 0) / counts.sum() + freed / counts.size
