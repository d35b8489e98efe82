"""Two runs side by side: each metric of both, how far they are apart, and whether that is more than noise."""

import math
from dataclasses import dataclass

from ultrathink_model.reporting.measures import STDERR, metric_of, shown
from ultrathink_model.reporting.stages import Stage

# Metrics of the last lines of training that are compared beside evaluation's.
TRAINING = ("val/loss", "train/loss", "train/tokens_per_second", "tokens")


@dataclass(frozen=True)
class MetricRow:
    """One metric of both runs.

    Attributes:
        name: The metric.
        values: Its value in each run, with its standard error.
        difference: The second run's less the first one's, with a sign; empty where one is missing.
        deviations: The difference in standard errors; None where these are not known.
    """

    name: str
    values: tuple[str, str]
    difference: str
    deviations: float | None


def metric_rows(first: Stage, second: Stage) -> list[MetricRow]:
    """Every metric that either run has, evaluation's first."""
    both = [_metrics(stage) for stage in (first, second)]
    names = dict.fromkeys(name for metrics in both for name in metrics if not name.endswith(STDERR))
    return [_row(name, *both) for name in names]


def headline(first: Stage, second: Stage) -> str:
    """Which run predicts held-out text better, in one sentence; empty where one was not evaluated."""
    bits = [metric_of(stage, "bits_per_byte") for stage in (first, second)]
    if bits[0] is None or bits[1] is None:
        return ""
    if (
        first.evaluation
        and second.evaluation
        and first.evaluation.data_fingerprint != second.evaluation.data_fingerprint
    ):
        return "The two runs were evaluated on different data: their held-out losses do not compare."
    word = "fewer" if bits[1] < bits[0] else "more"
    return (
        f"{second.name} needs {bits[1]:.3f} bits for each byte of held-out text, {abs(bits[1] - bits[0]):.3f} {word} than "
        f"{first.name}."
    )


def _row(name: str, first: dict[str, float], second: dict[str, float]) -> MetricRow:
    values = [metrics.get(name) for metrics in (first, second)]
    errors = [metrics.get(name + STDERR) for metrics in (first, second)]
    texts = [
        shown(value) + (f" ± {shown(error)}" if error is not None and math.isfinite(error) else "")
        for value, error in zip(values, errors, strict=True)
    ]
    difference, deviations = "", None
    if values[0] is not None and values[1] is not None:
        apart = values[1] - values[0]
        sign = "+" if apart > 0 else "−" if apart < 0 else ""
        difference = sign + shown(abs(apart))
        together = math.hypot(*(error for error in errors if error is not None))
        if all(error is not None for error in errors) and together > 0:
            deviations = abs(apart) / together
    return MetricRow(name, (texts[0], texts[1]), difference, deviations)


def _metrics(stage: Stage) -> dict[str, float]:
    metrics = dict(stage.evaluation.metrics) if stage.evaluation else {}
    metrics |= {name: value for name in TRAINING if (value := stage.last(name)) is not None}
    return metrics
