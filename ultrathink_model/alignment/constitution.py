"""The constitution: principles from a YAML file, and the texts that put them to a critic."""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ultrathink_model.config.profiles import CONFIG_FOLDER
from ultrathink_model.config.yaml_text import read_yaml
from ultrathink_model.errors import ConfigError

DEFAULT_FILE = CONFIG_FOLDER / "constitution.yaml"
# How a conversation is laid out for a model that was not trained on any particular layout.
PERSON, MODEL = "Human:", "Assistant:"
# What begins somebody's turn on a new line.
TURNS = (PERSON, MODEL, "Task:", "Critique:", "Revision:")


class Principle(BaseModel):
    """One principle: what a critique looks for, what a revision mends, and how two answers are compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    critique: str = Field(min_length=1)
    revision: str = Field(min_length=1)
    choice: str = Field(min_length=1)


class Constitution(BaseModel):
    """The principles, in the order of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    principles: tuple[Principle, ...] = Field(min_length=1)

    def principle(self, number: int) -> Principle:
        """The principle that a prompt or a round of this number is held to: each in turn."""
        return self.principles[number % len(self.principles)]


def load_constitution(path: str | None) -> Constitution:
    """Reads a constitution; None takes the one that comes with the project.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a list of principles.
    """
    file = DEFAULT_FILE if path is None else Path(path)
    try:
        return Constitution.model_validate(read_yaml(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"constitutional.constitution={file}: {error.strerror}; name a YAML file.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"constitutional.constitution={file} is not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"constitutional.constitution={file}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}; each "
            "principle has a name, a critique, a revision and a choice."
        ) from None


def question_text(request: str) -> str:
    """What the model answers."""
    return f"{PERSON} {request}\n\n{MODEL}"


def critique_text(request: str, answer: str, principle: Principle) -> str:
    """What asks for a critique of an answer."""
    return f"{question_text(request)} {answer}\n\nTask: {principle.critique}\n\nCritique:"


def revision_text(request: str, answer: str, critique: str, principle: Principle) -> str:
    """What asks for a better answer."""
    return f"{critique_text(request, answer, principle)} {critique}\n\nTask: {principle.revision}\n\nRevision:"


def choice_text(request: str, first: str, second: str, principle: Principle) -> str:
    """What asks for the better of two answers; the answer is A or B."""
    return (
        f"Somebody asked: {request}\n\n(A) {first}\n\n(B) {second}\n\n{principle.choice} Answer with the letter A or B "
        "alone.\n\nThe better answer is ("
    )


def harm_text(text: str, first: str, second: str) -> str:
    """What asks whether a text does harm; `first` and `second` are yes and no, and the answer is A or B."""
    return (
        f"Somebody wrote: {text}\n\nDoes this text do harm, or help with doing it?\n\n(A) {first}\n\n(B) {second}\n\n"
        "Answer with the letter A or B alone.\n\nThe answer is ("
    )


def cut_answer(text: str) -> str:
    """What a model wrote up to where it begins to speak for somebody else; nothing where it does so at once."""
    text = f"\n{text.lstrip()}"
    for mark in TURNS:
        text = text.split(f"\n{mark}", maxsplit=1)[0]
    return text.strip()
