"""The charts of training: loss of all stages on one axis, and what the optimizer and the machine did."""

from collections.abc import Sequence
from itertools import accumulate

from ultrathink_model.reporting.chart import Level, LineChart, Series, Style, settled_range
from ultrathink_model.reporting.stages import Stage

BASELINES = ("unigram", "bigram")

# Chart title, metric and unit of what is drawn beside the loss.
ENGINE_CHARTS = (
    ("Learning rate", "train/learning_rate", "per step"),
    ("Gradient norm", "train/grad_norm", "before clipping"),
    ("Throughput", "train/tokens_per_second", "tokens per second"),
)


def set_offsets(stages: Sequence[Stage]) -> None:
    """Lays the stages one after another on the common axis of tokens."""
    trained = [max(stage.curve("train/loss")[0] + stage.curve("val/loss")[0], default=0.0) for stage in stages]
    for stage, offset in zip(stages, accumulate(trained, initial=0.0), strict=False):
        stage.offset = offset


def stage_series(stages: Sequence[Stage], metric: str, label: str = "{stage}", style: Style = "line") -> list[Series]:
    """One curve for each stage that logged the metric, in the stage's colour, over the tokens of all stages."""
    series = []
    for stage in stages:
        x, y = stage.curve(metric)
        if x:
            name = label.format(stage=stage.name)
            series.append(Series(name, stage.number, [stage.offset + value for value in x], y, style))
    return series


def loss_chart(stages: Sequence[Stage]) -> LineChart | None:
    """Training and validation loss of every stage, with the baselines' losses as levels."""
    train = stage_series(stages, "train/loss", "{stage}, training", style="faint")
    validation = stage_series(stages, "val/loss", "{stage}, validation", style="marked")
    if not any(len(series.x) > 1 for series in train + validation):
        return None
    levels = baseline_levels(stages)
    held_out = [value for series in validation for value in series.y]
    seen = [value for series in train for value in series.y] or held_out
    y_range = settled_range(seen, held_out + [level.y for level in levels])
    note = "Thin lines are training batches, thick ones held-out text."
    return LineChart(
        title="Loss",
        y_unit="nats per token",
        x_unit="tokens",
        series=sorted([*train, *validation], key=lambda series: series.x[0]),
        levels=levels,
        starts=stage_starts(stages),
        y_range=y_range,
        note=note + (" The first steep steps run off the top." if max(seen) > y_range[1] else ""),
        wide=True,
    )


def baseline_levels(stages: Sequence[Stage]) -> list[Level]:
    """The losses of the n-gram models on the same held-out tokens."""
    metrics = {name: value for stage in stages if stage.evaluation for name, value in stage.evaluation.metrics.items()}
    return [Level(name, metrics[f"eval/{name}/loss"]) for name in BASELINES if f"eval/{name}/loss" in metrics]


def stage_starts(stages: Sequence[Stage]) -> list[tuple[float, str]]:
    """Where each stage but the first begins on the common axis; none where they lie beside each other."""
    trained = [stage for stage in stages if stage.curve("train/loss")[0] or stage.curve("val/loss")[0]]
    return [(stage.offset, stage.name) for stage in trained[1:] if stage.offset]


def engine_charts(stages: Sequence[Stage]) -> list[LineChart]:
    """Learning rate, gradient norm, throughput and auxiliary losses over the tokens of all stages."""
    names = [(name.removeprefix("train/aux/"), name) for stage in stages for name in stage.metric_names("train/aux/")]
    auxiliary = [(f"Auxiliary loss {short}", name, "nats per token") for short, name in dict(names).items()]
    charts = []
    for title, metric, unit in (*ENGINE_CHARTS, *auxiliary):
        series = stage_series(stages, metric)
        if series:
            charts.append(LineChart(title, unit, "tokens", series, starts=stage_starts(stages)))
    return charts
