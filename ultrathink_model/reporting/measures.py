"""What evaluation found, as tables and charts: with standard errors, and with the values of the run before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.reporting.chart import LineChart, Series
from ultrathink_model.reporting.curves import BASELINES
from ultrathink_model.reporting.quantities import short
from ultrathink_model.reporting.stages import Stage

TASK = "eval/validation/"
STDERR = "_stderr"
# Measure and decimals, in the order of the table's columns.
MEASURES = {"bits_per_byte": 3, "loss": 3, "perplexity": 1}
# These have a section of their own.
ELSEWHERE = "eval/multimodal/"
# Measures that are many and alike stand in tables of their own, closed at first.
CLOSED = {"eval/blimp_": "BLiMP by paradigm", "eval/context/": "Loss by position"}


@dataclass(frozen=True)
class Cell:
    """A figure, its standard error, and that of the run before; the last two are empty where they are not known."""

    value: str
    stderr: str = ""
    before: str = ""


@dataclass(frozen=True)
class EvaluationRow:
    """One model of the evaluation table; `share` is its bits per byte in percent of the largest."""

    name: str
    stage: Stage | None
    cells: list[Cell]
    share: float
    best: bool


@dataclass(frozen=True)
class MeasureTable:
    """Measures by name, with a cell for each evaluated stage."""

    title: str
    rows: list[tuple[str, list[Cell]]]
    is_open: bool


def metric_of(stage: Stage, measure: str) -> float | None:
    """A measure of a stage on the validation split; None where it was not evaluated."""
    return stage.evaluation.metrics.get(TASK + measure) if stage.evaluation else None


def evaluation_rows(stages: Sequence[Stage]) -> list[EvaluationRow]:
    """Every evaluated stage, and then the baselines, from the measures of the validation split."""
    evaluated = [stage for stage in stages if stage.evaluation]
    models: list[tuple[str, str, Stage | None, Stage]] = [(stage.name, TASK, stage, stage) for stage in evaluated]
    models += [
        (f"{name} model", f"eval/{name}/", None, evaluated[-1])
        for name in BASELINES
        if evaluated and f"eval/{name}/bits_per_byte" in _metrics(evaluated[-1].evaluation)
    ]
    bits = [_metrics(source.evaluation).get(f"{task}bits_per_byte", math.nan) for _, task, _, source in models]
    finite = [value for value in bits if math.isfinite(value)]
    return [
        EvaluationRow(
            name,
            stage,
            [_cell(source, task + measure, decimals, beside=stage) for measure, decimals in MEASURES.items()],
            share=100 * value / max(finite) if math.isfinite(value) else 0.0,
            best=bool(finite) and value == min(finite),
        )
        for (name, task, stage, source), value in zip(models, bits, strict=True)
    ]


def measure_tables(stages: Sequence[Stage]) -> list[MeasureTable]:
    """The metrics of evaluation that have no column of their own."""
    evaluated = [stage for stage in stages if stage.evaluation]
    own = {f"eval/{task}/{measure}" for task in ("validation", *BASELINES) for measure in MEASURES}
    names = dict.fromkeys(name for stage in evaluated for name in _metrics(stage.evaluation))
    tables: dict[str, list[tuple[str, list[Cell]]]] = {"Other measures": [], **{title: [] for title in CLOSED.values()}}
    for name in names:
        if name in own or name.endswith(STDERR) or name.startswith(ELSEWHERE):
            continue
        title = next((title for prefix, title in CLOSED.items() if name.startswith(prefix)), "Other measures")
        tables[title].append((name.removeprefix("eval/"), [_cell(stage, name, 3, beside=stage) for stage in evaluated]))
    return [MeasureTable(title, rows, title not in CLOSED.values()) for title, rows in tables.items() if rows]


def measure_charts(stages: Sequence[Stage]) -> list[LineChart]:
    """Calibration, and loss by position."""
    reliability = [
        Series(stage.name, stage.number, [100 * b.confidence for b in bins], [b.accuracy for b in bins], "marked")
        for stage in stages
        if stage.evaluation and (bins := stage.evaluation.reliability)
    ]
    context = [
        Series(
            stage.name,
            stage.number,
            [(place.first + place.last) / 2 for place in places],
            [place.loss for place in places],
            "marked",
        )
        for stage in stages
        if stage.evaluation and (places := stage.evaluation.context)
    ]
    charts = []
    if reliability:
        ideal = Series("as sure as right", 1, [0.0, 100.0], [0.0, 1.0], "faint", palette="path")
        note = "Above the thin line the model is right more often than it is sure; below it, it is too sure."
        charts.append(
            LineChart(
                "Calibration",
                "how often the likeliest token came",
                "its probability, %",
                [*reliability, ideal],
                y_range=(0.0, 1.0),
                note=note,
                percent=True,
            )
        )
    if any(len(series.x) > 1 for series in context):
        charts.append(LineChart("Loss by position", "nats per token", "tokens of context", context))
    return charts


def shown(value: float | None, decimals: int = 3) -> str:
    """A figure as a table shows it."""
    if value is None:
        return "—"
    if value and abs(value) < 10**-decimals:
        return short(value, 2)
    return f"{value:.{decimals}f}" if abs(value) < 1000 else short(value, 4)


def _cell(stage: Stage, name: str, decimals: int, *, beside: Stage | None) -> Cell:
    """A metric of a stage; `beside` is the stage whose run before is told of, none for what is no stage's own."""
    metrics = _metrics(stage.evaluation)
    stderr = metrics.get(name + STDERR)
    before = _metrics(beside.previous).get(name) if beside else None
    return Cell(
        shown(metrics.get(name), decimals),
        f"± {shown(stderr, decimals)}" if stderr is not None and math.isfinite(stderr) else "",
        f"before {shown(before, decimals)}" if before is not None else "",
    )


def _metrics(evaluation: EvaluationResult | None) -> dict[str, float]:
    return evaluation.metrics if evaluation else {}
