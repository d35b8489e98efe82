"""Images and sound: how often the model was right about them, with them and without, and some of its answers."""

from collections.abc import Sequence
from typing import NamedTuple

from ultrathink_model.evaluation.result import MediaAnswer
from ultrathink_model.reporting.stages import Stage

KINDS = {"image": "an image", "audio": "a sound", "sum": "the sum of one of each"}
PREFIX = "eval/multimodal/"


class MediaRow(NamedTuple):
    """Accuracies of one stage on one kind of question, as text."""

    stage: Stage
    kind: str
    given: str
    withheld: str


def media_rows(stages: Sequence[Stage]) -> list[MediaRow]:
    """A row for each stage and kind of question that was asked."""
    return [
        MediaRow(stage, name, _share(metrics, f"{kind}_accuracy"), _share(metrics, f"{kind}_accuracy_withheld"))
        for stage in stages
        for metrics in ([stage.evaluation.metrics] if stage.evaluation else [])
        for kind, name in KINDS.items()
        if f"{PREFIX}{kind}_accuracy" in metrics
    ]


def media_answers(stages: Sequence[Stage]) -> list[tuple[Stage, list[MediaAnswer]]]:
    """The answers that each stage's evaluation kept to be shown."""
    return [
        (stage, stage.evaluation.media_answers)
        for stage in stages
        if stage.evaluation and stage.evaluation.media_answers
    ]


def _share(metrics: dict[str, float], name: str) -> str:
    return f"{100 * metrics[PREFIX + name]:.1f} % ± {100 * metrics[f'{PREFIX}{name}_stderr']:.1f}"
