import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_model import data
from ultrathink_model.data.loader import ValidationLoader
from ultrathink_model.data.tokenizer_training import train_tokenizer
from ultrathink_model.evaluation import ngram
from ultrathink_model.evaluation.ngram import KneserNeyBigram, Unigram, baseline_losses, count_bigrams, split_bigrams
from ultrathink_model.evaluation.perplexity import bits_per_byte


def pairs_of(text: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(text[:-1]), np.array(text[1:])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=60))
def test_probabilities_sum_to_one_after_every_token(text):
    vocab_size = 8  # token 7 never occurs
    counts = count_bigrams([pairs_of(text)], vocab_size)
    for model in (Unigram(counts), KneserNeyBigram(counts)):
        for previous in range(vocab_size):
            logprobs = model.logprobs(np.full(vocab_size, previous), np.arange(vocab_size))
            assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-12)
            assert np.isfinite(logprobs).all()


def test_kneser_ney_equals_the_formula_worked_by_hand():
    # a b a b a c: bigrams ab 2, ba 2, ac 1 over the vocabulary a b c d.
    a, b, c, d = range(4)
    model = KneserNeyBigram(count_bigrams([pairs_of([a, b, a, b, a, c])], 4))
    # Counts of counts n1=1, n2=2; different contexts: a after 1, b after 1, c after 1, so n1=3, n2=0 of those.
    discount = (1 + 0.5) / (1 + 2 * 2 + 1)
    lower_discount = (3 + 0.5) / (3 + 1)
    freed = lower_discount * 3 / 3 / 4
    seen, unseen = (1 - lower_discount) / 3 + freed, freed
    after_a = discount * 2 / 3  # two different tokens after three a
    expected = {
        (a, b): (2 - discount) / 3 + after_a * seen,
        (a, c): (1 - discount) / 3 + after_a * seen,
        (a, a): after_a * seen,
        (a, d): after_a * unseen,
        (b, a): (2 - discount) / 2 + discount / 2 * seen,
        (d, a): seen,  # nothing was ever seen after d
    }
    for (previous, token), probability in expected.items():
        found = model.logprobs(np.array([previous]), np.array([token]))
        assert math.exp(found[0]) == pytest.approx(probability, abs=1e-12)


def test_kneser_ney_judges_a_word_by_its_contexts_not_its_frequency():
    # 3 is frequent but only ever after 2; 4 is rarer and follows everything. After the unseen 6, 4 is likelier.
    text = [2, 3] * 20 + [0, 4, 1, 4, 2, 4, 5, 4]
    counts = count_bigrams([pairs_of(text)], 7)
    tokens = np.array([3, 4])
    bigram = KneserNeyBigram(counts).logprobs(np.array([6, 6]), tokens)
    unigram = Unigram(counts).logprobs(np.array([6, 6]), tokens)
    assert bigram[1] > bigram[0]
    assert unigram[0] > unigram[1]


def test_counting_in_pieces_equals_counting_at_once():
    random = np.random.default_rng(0)
    previous, tokens = random.integers(0, 50, (2, 5000))
    whole = count_bigrams([(previous, tokens)], 50)
    pieces = count_bigrams([(previous[i : i + 77], tokens[i : i + 77]) for i in range(0, 5000, 77)], 50)
    np.testing.assert_array_equal(whole.keys, pieces.keys)
    np.testing.assert_array_equal(whole.counts, pieces.counts)
    assert whole.counts.sum() == 5000


@pytest.mark.parametrize("chunk", [7, 2**24])
def test_scored_tokens_are_those_that_the_loader_predicts(manifest, text_config, monkeypatch, chunk):
    monkeypatch.setattr(ngram, "CHUNK_TOKENS", chunk)
    pieces = list(split_bigrams(manifest, "validation"))
    previous, tokens = (np.concatenate(column) for column in zip(*pieces, strict=True))
    batches = list(ValidationLoader(manifest, text_config))
    labels = np.concatenate([batch.labels.flatten().numpy() for batch in batches])
    inputs = np.concatenate([batch.input_ids.flatten().numpy() for batch in batches])
    np.testing.assert_array_equal(tokens, labels[labels != -100])
    np.testing.assert_array_equal(previous, inputs[labels != -100])
    assert tokens.size == manifest.splits["validation"].tokens


def test_the_better_model_has_the_lower_loss(manifest):
    losses = baseline_losses(manifest)
    assert losses["bigram"].loss < losses["unigram"].loss < math.log(manifest.vocab_size)


@pytest.mark.slow
def test_baselines_of_the_built_in_corpus_are_the_known_figures():
    with lzma.open(Path(data.__file__).with_name("sotu.jsonl.xz"), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    held_out = texts[9::10]
    training = [text for number, text in enumerate(texts) if number % 10 != 9]
    tokenizer = train_tokenizer(training, 4096)

    def pairs(documents):
        stream = [tokenizer.eos_id]
        for ids in tokenizer.encode_batch(documents):
            stream += [*ids, tokenizer.eos_id]
        return pairs_of(stream)

    counts = count_bigrams([pairs(training)], 4096)
    size = sum(len(text.encode()) for text in held_out)
    bits = [
        bits_per_byte(-model(counts).logprobs(*pairs(held_out)).sum(), size) for model in (Unigram, KneserNeyBigram)
    ]
    # Measured before with another implementation of both models, and given with two decimals.
    assert bits == pytest.approx([2.17, 1.49], abs=0.006)
