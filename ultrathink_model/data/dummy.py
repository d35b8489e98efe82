"""The dummy source: synthetic text with a known structure and a known least loss, for trying things out."""

import logging
import math
from collections.abc import Iterator

import numpy as np

from ultrathink_model.data.document import Row
from ultrathink_model.data.manifest import Split

logger = logging.getLogger(__name__)

SEED = 20_260
NUM_DOCUMENTS = 400
NUM_WORDS = 64
SENTENCES = 12
SUCCESSOR_PROBABILITIES = (0.5, 0.25, 0.15, 0.1)
STOP_PROBABILITY = 0.1
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


class DummySource:
    """Sentences of a Markov chain over 64 invented words: each word has four successors, of fixed probabilities.

    A model that learns nothing but how often words occur stays near 6 bits a word; one that learns which word follows
    which reaches about `ENTROPY_PER_WORD`, 2.05 bits. The text is the same in every run and on every machine.
    """

    name = "dummy"
    licence = "CC0-1.0 (generated)"
    streaming = False
    has_validation = False
    folder = None

    def identity(self) -> dict[str, object]:
        """What the fingerprint covers: all constants of the chain."""
        return {"kind": "dummy", "version": 1, "seed": SEED, "documents": NUM_DOCUMENTS}

    def rows(self, split: Split) -> Iterator[Row]:
        """The generated documents."""
        logger.info(
            "dummy: %d synthetic documents of a Markov chain over %d invented words (%.2f bits a word at best); "
            "good for trying things out, not for training a model",
            NUM_DOCUMENTS,
            NUM_WORDS,
            ENTROPY_PER_WORD,
        )
        random = np.random.default_rng(SEED)
        words = _invent_words(random)
        successors = np.stack([random.choice(NUM_WORDS, len(SUCCESSOR_PROBABILITIES), replace=False) for _ in words])
        for number in range(1, NUM_DOCUMENTS + 1):
            sentences = [_sentence(random, words, successors) for _ in range(SENTENCES)]
            yield Row("dummy", number, " ".join(sentences))


def _entropy(probabilities: tuple[float, ...]) -> float:
    return -sum(share * math.log2(share) for share in probabilities)


ENTROPY_PER_WORD = _entropy(SUCCESSOR_PROBABILITIES) * (1 - STOP_PROBABILITY) + _entropy(
    (STOP_PROBABILITY, 1 - STOP_PROBABILITY)
)


def _invent_words(random: np.random.Generator) -> list[str]:
    words: list[str] = []
    while len(words) < NUM_WORDS:
        syllables = random.integers(1, 4)
        word = "".join(CONSONANTS[random.integers(14)] + VOWELS[random.integers(5)] for _ in range(syllables))
        if word not in words:
            words.append(word)
    return words


def _sentence(random: np.random.Generator, words: list[str], successors: np.ndarray) -> str:
    word = int(random.integers(NUM_WORDS))
    chosen = [word]
    while random.random() >= STOP_PROBABILITY:
        word = int(successors[word, random.choice(len(SUCCESSOR_PROBABILITIES), p=SUCCESSOR_PROBABILITIES)])
        chosen.append(word)
    return " ".join(words[number] for number in chosen) + "."
