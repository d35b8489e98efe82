"""What an evaluation found, and how it is kept: JSON files that are replaced whole or not at all."""

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict


class SavedRecord(BaseModel):
    """A record that is kept as a JSON file; a number that is not finite is written as a string."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    def save(self, path: Path) -> None:
        """Replaces the file in one step, durably: after a crash it holds the old record or the new, whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads the file.

        Raises:
            FileNotFoundError: There is none.
            pydantic.ValidationError: It does not hold such a record.
        """
        return cls.model_validate_json(path.read_bytes())


class Sample(BaseModel):
    """A text that the model wrote: `text` follows on `prompt`, which is held-out text."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    text: str


class ReadPiece(BaseModel):
    """A piece of held-out text, a token as a rule, and the mean passes of a routed block that it made."""

    model_config = ConfigDict(frozen=True)

    text: str
    passes: float


class ReliabilityBin(BaseModel):
    """Tokens that the model was about equally sure of: its mean confidence, and how often it was right."""

    model_config = ConfigDict(frozen=True)

    confidence: float
    accuracy: float
    tokens: int


class ContextLoss(BaseModel):
    """Mean loss of the held-out tokens that have from `first` to `last` tokens of context, with its standard error."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    first: int
    last: int
    loss: float
    stderr: float
    tokens: int


class MediaAnswer(BaseModel):
    """A question about an image, a sound or both, and what the model said.

    Attributes:
        kind: `image`, `audio` or `sum`.
        prompt: The question, with placeholders for its media.
        answer: The word that is right.
        said: The first word that the model wrote.
        withheld: The first word that it wrote to the prompt alone.
        pictures: The images, then the sounds' spectrograms, each as a `data:` address of a PNG.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    prompt: str
    answer: str
    said: str
    withheld: str
    pictures: list[str]


class EvaluationResult(SavedRecord):
    """The content of `evaluation.json`.

    Attributes:
        metrics: Values by name, `eval/<task>/<metric>`: losses in nats per token, bits per byte of held-out text. The
            standard error of one, where it has one, stands under its name with `_stderr` after it.
        samples: Texts generated from held-out prompts.
        reliability: Confidence and accuracy of the likeliest token, the least confident first.
        context: Loss by the tokens of context, the shortest first.
        reading: A held-out text and how deep each of its tokens went; empty without the reasoning engine.
        media_answers: Some answers to questions about images and sounds; empty for data without the source `digits`.
        data_fingerprint: The prepared data that was evaluated on.
        validation_tokens: Tokens that were predicted.
        validation_bytes: UTF-8 bytes of the text that they stand for.
    """

    metrics: dict[str, float]
    samples: list[Sample] = []
    reliability: list[ReliabilityBin] = []
    context: list[ContextLoss] = []
    reading: list[ReadPiece] = []
    media_answers: list[MediaAnswer] = []
    data_fingerprint: str
    validation_tokens: int
    validation_bytes: int
