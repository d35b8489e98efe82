"""The model card: README.md of an exported model, from plain facts about its data, training and evaluation."""

import functools
from collections.abc import Sequence
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict

from ultrathink_model.config import Config
from ultrathink_model.evaluation.result import EvaluationResult

CARD_NAME = "README.md"


class Facts(BaseModel):
    """A frozen record of plain values."""

    model_config = ConfigDict(frozen=True)


class SourceFacts(Facts):
    """A data set that the model was trained on."""

    name: str
    licence: str
    documents: int
    bytes: int


class StageFacts(Facts):
    """A stage of training; `tokens` is zero where a stage does not count them."""

    name: str
    kind: str
    steps: int
    tokens: int


class ModelCard(Facts):
    """What the card says. What is not known stays empty and is left out, or said to be unknown.

    Attributes:
        name: The model's name.
        config: The resolved config of its last stage.
        parameters: Weights, each counted once.
        active_parameters: Those that one token meets; less than all of them in a mixture of experts.
        licence: Hugging Face's identifier of the weights' licence; None until their owner has chosen one.
        stages: How it was trained, first stage first.
        sources: What it was trained on.
        evaluation: How it did on held-out text.
        needs_code: Whether it loads only with the code that lies in its folder.
    """

    name: str
    config: Config
    parameters: int
    active_parameters: int
    licence: str | None = None
    stages: Sequence[StageFacts] = ()
    sources: Sequence[SourceFacts] = ()
    evaluation: EvaluationResult | None = None
    needs_code: bool = False


def write_model_card(folder: Path, card: ModelCard) -> Path:
    """Writes the card as `README.md` of a model folder."""
    path = folder / CARD_NAME
    path.write_text(render_model_card(card), encoding="utf-8")
    return path


def render_model_card(card: ModelCard) -> str:
    """The card's text: YAML front matter that the Hugging Face Hub reads, then Markdown."""
    header = yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True)
    return (
        _environment().get_template("model_card.md").render(card=card, header=header, features=_features(card.config))
    )


def front_matter(card: ModelCard) -> dict[str, object]:
    """The card's metadata in the Hub's terms."""
    values: dict[str, object] = {"license": card.licence} if card.licence else {}
    values |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ultrathink", *_features(card.config)],
    }
    if card.evaluation:
        values["model-index"] = [{"name": card.name, "results": [_results(card, card.evaluation)]}]
    return values


def _results(card: ModelCard, evaluation: EvaluationResult) -> dict[str, object]:
    names = {"loss": "Loss (nats per token)", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}
    data = " + ".join(source.name for source in card.sources) or card.config.data.dataset
    return {
        "task": {"type": "text-generation", "name": "Language modelling"},
        "dataset": {"type": data, "name": f"{data}, held-out documents", "split": "validation"},
        "metrics": [
            {"type": measure, "name": name, "value": round(evaluation.metrics[f"eval/validation/{measure}"], 6)}
            for measure, name in names.items()
            if f"eval/validation/{measure}" in evaluation.metrics
        ],
    }


def _features(config: Config) -> list[str]:
    advanced = config.advanced
    named = {
        "mixture-of-experts": advanced.enable_moe,
        "dynamic-reasoning": advanced.enable_dre,
        "rlhf": advanced.enable_rlhf,
    }
    return [name for name, is_on in named.items() if is_on]


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ultrathink_model.export", "templates"),
        # Markdown, not HTML: what models and data sets say is fenced or made one line by the filters below.
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "fenced": _fenced, "megabytes": lambda size: f"{size / 1e6:,.1f} MB"}
    return environment


def _cell(text: str) -> str:
    """Text for one line of Markdown or one cell of a table, taken as it stands."""
    escaped = "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in text)
    return " ".join(escaped.split())


def _fenced(text: str) -> str:
    """Text as a block of its own, within a fence longer than any that it holds."""
    longest = max((len(run) for run in "".join(sign if sign == "`" else " " for sign in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"
