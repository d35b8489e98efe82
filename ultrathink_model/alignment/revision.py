"""Critique and revision: the model answers red-team prompts, and its critic makes the answers better."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from ultrathink_model.alignment.constitution import (
    Constitution,
    choice_text,
    critique_text,
    question_text,
    revision_text,
)
from ultrathink_model.alignment.critic import Critic, SelfCritic
from ultrathink_model.config import Config
from ultrathink_model.data.json_lines import read_json_lines
from ultrathink_model.data.safety import load_safety_texts
from ultrathink_model.errors import CriticError, DataError

# Prompts that go through the model together; what is done of them is kept before the next are begun.
BATCH = 16
# A preference that lies closer to one half than this is rounding.
INDIFFERENT = 1e-5


class Turn(BaseModel):
    """One critique of an answer and what was made of it."""

    model_config = ConfigDict(frozen=True)

    principle: str
    critique: str
    revision: str


class Revision(BaseModel):
    """A line of `revisions.jsonl`: all that was said to one prompt.

    Attributes:
        number: Place of the prompt.
        prompt: The red-team prompt.
        answer: What the model first answered; None where it answered nothing.
        turns: Critiques and revisions, in order.
        is_usable: Whether every one of them could be used; only such revisions are learnt from.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    prompt: str
    answer: str | None
    turns: tuple[Turn, ...]
    is_usable: bool


class Choice(BaseModel):
    """A line of `choices.jsonl`: two answers to one prompt, and which the critic took.

    Attributes:
        number: Place of the prompt.
        prompt: The red-team prompt.
        principle: What the choice went by.
        first: One answer of the tuned model.
        second: The other.
        preference: Probability that the first is better, a mean over both orders; None where it cannot be used.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    prompt: str
    principle: str
    first: str | None
    second: str | None
    preference: float | None

    def as_pair(self) -> dict[str, str | float] | None:
        """The row of `preferences.jsonl`; None where there is nothing to prefer."""
        if self.preference is None or abs(self.preference - 0.5) < INDIFFERENT or self.first == self.second:
            return None
        assert self.first is not None
        assert self.second is not None
        chosen, rejected = (self.first, self.second) if self.preference > 0.5 else (self.second, self.first)
        return {"prompt": question_text(self.prompt), "chosen": f" {chosen}", "rejected": f" {rejected}"}


Record = TypeVar("Record", Revision, Choice)


def red_team_prompts(config: Config) -> list[str]:
    """The prompts that `constitutional.red_team_data` names, or built-in ones that ask for harm.

    The built-in ones are those that the harm head learns from, so that what it is measured on stays unseen.

    Raises:
        DataError: The file cannot be read, or a row has no text in `prompt`.
    """
    section = config.constitutional
    if section.red_team_data is None:
        texts = [text for text in load_safety_texts(config).train if text.categories]
        # Neighbours share a topic: a stride takes as many topics as there is room for.
        stride = max(1, len(texts) // section.num_prompts)
        return [text.text for text in texts[::stride]][: section.num_prompts]
    path, prompts = Path(section.red_team_data), []
    for item in read_json_lines(path, path.name):
        prompt = item[1].get("prompt") if isinstance(item, tuple) else None
        if not isinstance(prompt, str) or not prompt.strip():
            row = item[0] if isinstance(item, tuple) else item.row
            raise DataError(f"constitutional.red_team_data={path}: row {row} has no text in `prompt`; mend the row.")
        prompts.append(prompt)
    if len(prompts) < 2:
        raise DataError(f"constitutional.red_team_data={path} holds {len(prompts)} prompts; it needs two or more.")
    return prompts[: section.num_prompts]


def revise(
    prompts: Sequence[str],
    numbers: Sequence[int],
    model: SelfCritic,
    critic: Critic,
    constitution: Constitution,
    config: Config,
    keep: Callable[[list[Revision]], None],
) -> None:
    """Answers the prompts of these numbers and has each answer criticised and revised.

    Args:
        prompts: All prompts.
        numbers: Those that are still to do.
        model: The model that answers.
        critic: Who criticises and revises.
        constitution: Each prompt's rounds take one principle after the other, beginning with another one each.
        config: `constitutional.revisions` is the number of rounds.
        keep: Takes what is done, a batch at a time.

    Raises:
        CriticError: An answer cannot be used, and `constitutional.on_bad_answer` is `error`.
    """
    for start in range(0, len(numbers), BATCH):
        batch = numbers[start : start + BATCH]
        answers = model.write([question_text(prompts[number]) for number in batch], _draw(batch[0], 0))
        current: dict[int, str] = {n: answer for n, answer in zip(batch, answers, strict=True) if answer}
        turns: dict[int, list[Turn]] = {number: [] for number in batch}
        for round_number in range(config.constitutional.revisions):
            live = list(current)
            rules = [constitution.principle(number + round_number) for number in live]
            asked = [critique_text(prompts[n], current[n], rule) for n, rule in zip(live, rules, strict=True)]
            critiques = critic.write(asked, _draw(batch[0], 2 * round_number + 1)) if live else []
            known = [(n, rule, said) for n, rule, said in zip(live, rules, critiques, strict=True) if said]
            texts = [revision_text(prompts[n], current[n], said, rule) for n, rule, said in known]
            revisions = critic.write(texts, _draw(batch[0], 2 * round_number + 2)) if texts else []
            current = {}
            for (number, rule, said), better in zip(known, revisions, strict=True):
                turns[number].append(Turn(principle=rule.name, critique=said, revision=better or ""))
                if better:
                    current[number] = better
        done = [
            Revision(
                number=number,
                prompt=prompts[number],
                answer=answer,
                turns=tuple(turns[number]),
                is_usable=number in current,
            )
            for number, answer in zip(batch, answers, strict=True)
        ]
        _keep_usable(done, [revision.is_usable for revision in done], keep, config)


def choose(
    prompts: Sequence[str],
    numbers: Sequence[int],
    model: SelfCritic,
    critic: Critic,
    constitution: Constitution,
    config: Config,
    keep: Callable[[list[Choice]], None],
) -> None:
    """Draws two answers to each prompt and asks the critic for the better one, in both orders; arguments as `revise`.

    Asked in one order, a critic that always says A would make labels out of nothing; over both orders its
    preference comes to one half, and the pair is dropped.
    """
    for start in range(0, len(numbers), BATCH):
        batch = numbers[start : start + BATCH]
        questions = [question_text(prompts[number]) for number in batch]
        sides = [model.write(questions, _draw(batch[0], 1000 + side)) for side in range(2)]
        both = [(number, a, b) for number, a, b in zip(batch, *sides, strict=True) if a and b]
        rules = {number: constitution.principle(number) for number in batch}
        orders = [
            critic.choose([choice_text(prompts[n], *((a, b) if is_first else (b, a)), rules[n]) for n, a, b in both])
            if both
            else []
            for is_first in (True, False)
        ]
        preferences = {
            number: None if first is None or second is None else (first + 1 - second) / 2
            for (number, _, _), first, second in zip(both, *orders, strict=True)
        }
        done = [
            Choice(
                number=number,
                prompt=prompts[number],
                principle=rules[number].name,
                first=first,
                second=second,
                preference=preferences.get(number),
            )
            for number, first, second in zip(batch, *sides, strict=True)
        ]
        _keep_usable(done, [choice.preference is not None for choice in done], keep, config)


def _draw(number: int, purpose: int) -> int:
    """A number that seeds a batch's draws for one purpose."""
    return number * 10_000 + purpose


def _keep_usable(
    done: list[Record], usable: Sequence[bool], keep: Callable[[list[Record]], None], config: Config
) -> None:
    """Keeps a batch. Where a bad answer ends the run only the good ones are kept, and the bad are asked for again."""
    if config.constitutional.on_bad_answer == "skip" or all(usable):
        keep(done)
        return
    keep([record for record, is_usable in zip(done, usable, strict=True) if is_usable])
    bad = [record for record, is_usable in zip(done, usable, strict=True) if not is_usable]
    raise CriticError(
        f"no usable answer about {len(bad)} of {len(done)} prompts, {bad[0].prompt!r} among them; what could be used is "
        "kept. Start again to ask once more, take another critic, or set constitutional.on_bad_answer=skip"
    )
