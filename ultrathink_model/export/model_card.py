"""The model card: README.md of an exported model, from plain facts about its data, training and evaluation."""

import functools
from collections.abc import Sequence
from datetime import timedelta
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
    """A stage of training; what is zero or empty is not known.

    Attributes:
        name: Its run's name.
        kind: What it did.
        steps: Optimizer steps.
        tokens: Tokens that it trained on.
        seconds: What it took.
        device: Name of its devices.
        devices: How many of them there were.
        watts: Power of one.
        price: US dollars for an hour of one; None where it has no price.
    """

    name: str
    kind: str
    steps: int
    tokens: int
    seconds: float = 0.0
    device: str = ""
    devices: int = 1
    watts: float = 0.0
    price: float | None = None

    @property
    def device_hours(self) -> float:
        """Hours of all its devices together."""
        return self.seconds * self.devices / 3600

    @property
    def energy(self) -> float:
        """Kilowatt-hours, as if every device drew its whole power all the time."""
        return self.device_hours * self.watts / 1000


class FileFacts(Facts):
    """An exported file beside the Hugging Face folder.

    Attributes:
        format: Its format, as `export.formats` spells it.
        path: Where it lies in the export.
        bytes: Its size, and that of weights that lie beside it.
        sha256: Hash over all that.
        loss: Loss on held-out tokens in nats; None where it was not measured.
    """

    format: str
    path: str
    bytes: int
    sha256: str
    loss: float | None = None


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
        carbon_intensity: Kilograms of CO2 equivalent per kWh.
        files: Further formats.
        files_loss: The model's own loss on the tokens that theirs was measured on.
        files_loss_tokens: How many these are.
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
    carbon_intensity: float = 0.0
    files: Sequence[FileFacts] = ()
    files_loss: float | None = None
    files_loss_tokens: int = 0

    @property
    def timed_stages(self) -> list[StageFacts]:
        """The stages whose time and devices are known."""
        return [stage for stage in self.stages if stage.seconds and stage.device]

    @property
    def energy(self) -> float:
        """Kilowatt-hours of all these stages."""
        return sum(stage.energy for stage in self.timed_stages)

    @property
    def cost(self) -> float | None:
        """US dollars for all these stages; None where one's devices have no price."""
        prices = [stage.price for stage in self.timed_stages]
        if None in prices or not prices:
            return None
        return sum(stage.device_hours * (stage.price or 0) for stage in self.timed_stages)


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
    environment.filters |= {
        "cell": _cell,
        "fenced": _fenced,
        "megabytes": lambda size: f"{size / 1e6:,.1f} MB",
        "duration": lambda seconds: str(timedelta(seconds=round(seconds))),
    }
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
