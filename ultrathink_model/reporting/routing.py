"""Where tokens went: the load of each expert, the share of each group, and the depth of reasoning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultrathink_model.reporting.chart import Level, LineChart, Series
from ultrathink_model.reporting.curves import stage_series, stage_starts
from ultrathink_model.reporting.stages import Stage

PATHS = ("fast", "standard", "deep", "ultra_deep")
# By the name in the metrics of a multimodal run.
MODALITIES = {"text": "text", "image": "images", "audio": "sound"}


@dataclass(frozen=True)
class Cell:
    """One expert in one layer, or one piece of text; `heat` is its place on the colour scale in percent.

    The scale of experts ends at twice the fair share, that of texts at three passes.
    """

    heat: float
    title: str
    text: str = ""


@dataclass(frozen=True)
class Group:
    """A range of experts: its share of all tokens beside its share of the experts, in percent."""

    name: str
    experts: int
    share: float
    fair: float


@dataclass(frozen=True)
class SourceCell:
    """The share of one source group's tokens that one expert group took, in percent, and in units of chance."""

    share: float
    times_chance: float
    own: bool


@dataclass(frozen=True)
class HeatMap:
    """The load of every expert: rows are mixture layers, each cut into the groups' cells."""

    stage: Stage
    rows: list[list[list[Cell]]]
    groups: list[Group]

    @property
    def columns(self) -> str:
        """The groups' widths, as a CSS grid's columns."""
        return " ".join(f"minmax(0, {group.experts}fr)" for group in self.groups)


@dataclass(frozen=True)
class SourceMap:
    """Where the tokens of tagged sources went: a row a source group, a cell an expert group, in the order of `columns`."""

    stage: Stage
    columns: list[str]
    rows: list[tuple[str, list[SourceCell]]]


@dataclass(frozen=True)
class Reading:
    """A held-out text coloured by depth; `passes` is the mean over all its tokens."""

    stage: Stage
    pieces: list[Cell]
    passes: float


@dataclass(frozen=True)
class PathShares:
    """The share of each path in percent, one row a routed layer."""

    stage: Stage
    rows: list[list[tuple[str, float]]]


def heat_maps(stages: Sequence[Stage]) -> list[HeatMap]:
    """One heat map for each stage that has experts."""
    return [_heat_map(stage) for stage in stages if stage.routing and stage.routing.load]


def source_maps(stages: Sequence[Stage]) -> list[SourceMap]:
    """One map for each stage whose sources are tagged with expert groups."""
    return [found for stage in stages if stage.routing and (found := _source_map(stage)).rows]


def readings(stages: Sequence[Stage]) -> list[Reading]:
    """The text of each evaluated stage that reasons at several depths."""
    return [
        Reading(
            stage,
            [
                Cell(round(100 * piece.passes / (len(PATHS) - 1), 1), f"{piece.passes:.2g} passes", piece.text)
                for piece in stage.evaluation.reading
            ],
            sum(piece.passes for piece in stage.evaluation.reading) / len(stage.evaluation.reading),
        )
        for stage in stages
        if stage.evaluation and stage.evaluation.reading
    ]


def path_shares(stages: Sequence[Stage]) -> list[PathShares]:
    """The last step's paths of each stage that reasons at several depths."""
    return [
        PathShares(
            stage,
            [
                [(_spoken(path), 100 * share) for path, share in zip(PATHS, row, strict=True)]
                for row in stage.routing.paths
            ],
        )
        for stage in stages
        if stage.routing and stage.routing.paths
    ]


def routing_charts(stages: Sequence[Stage]) -> list[LineChart]:
    """Router entropy, dropped tokens, depth shares and compute over the tokens of all stages."""
    starts = stage_starts(stages)
    charts = []
    shares = _depth_series(stages)
    if shares:
        charts.append(
            LineChart(
                "Reasoning paths", "share of tokens", "tokens", shares, starts=starts, y_range=(0.0, 1.0), percent=True
            )
        )
    fair = [Level("fair", 1.0)]
    of_media = [
        (f"Fullest expert by {name} alone", f"train/moe/{modality}/max_load", "times its fair share", fair)
        for modality, name in MODALITIES.items()
    ]
    for title, metric, unit, levels in (
        ("Reasoning compute", "train/dre/compute", "passes per token", _budgets(stages)),
        ("Fullest expert", "train/moe/max_load", "times its fair share", fair),
        ("Emptiest expert", "train/moe/min_load", "times its fair share", fair),
        *of_media,
        ("Router entropy", "train/moe/entropy", "share of an even choice's", []),
        ("Dropped tokens", "train/moe/dropped", "share of tokens", []),
    ):
        series = stage_series(stages, metric)
        if any(any(curve.y) for curve in series):
            charts.append(LineChart(title, unit, "tokens", series, levels, starts))
    return charts


def _heat_map(stage: Stage) -> HeatMap:
    assert stage.routing is not None
    load = stage.routing.load
    experts = len(load[0])
    sizes = {name: size for name, size in stage.routing.groups.items() if size} or {"experts": experts}
    rows, totals = [], dict.fromkeys(sizes, 0.0)
    for layer, shares in enumerate(load):
        cells, first = [], 0
        for name, size in sizes.items():
            group = range(first, min(first + size, len(shares)))
            cells.append([_cell(layer, name, expert, shares[expert], len(shares)) for expert in group])
            totals[name] += sum(shares[expert] for expert in group) / len(load)
            first += size
        rows.append(cells)
    groups = [Group(name, size, 100 * totals[name], 100 * size / experts) for name, size in sizes.items()]
    return HeatMap(stage, rows, groups)


def _source_map(stage: Stage) -> SourceMap:
    assert stage.routing is not None
    groups, total = stage.routing.groups, max(1, sum(stage.routing.groups.values()))
    rows = []
    for source, shares in zip(groups, stage.routing.group_share, strict=False):
        cells = [
            SourceCell(100 * share, share * total / size, group == source)
            for (group, size), share in zip(groups.items(), shares, strict=True)
            if size and share is not None
        ]
        if cells:
            rows.append((source, cells))
    return SourceMap(stage, [group for group, size in groups.items() if size], rows)


def _cell(layer: int, group: str, expert: int, share: float, experts: int) -> Cell:
    relative = share * experts
    return Cell(
        heat=round(min(100.0, 50 * relative), 1),
        title=f"mixture layer {layer + 1}, expert {expert + 1} ({group}): {100 * share:.1f} % of tokens, {relative:.2f}× its fair share",
    )


def _depth_series(stages: Sequence[Stage]) -> list[Series]:
    """The paths' shares over time, stacked from fast at the bottom to ultra-deep at the top."""
    series: list[Series] = []
    for stage in stages:
        curves = [stage.curve(f"train/dre/path/{path}") for path in PATHS]
        x = curves[0][0]
        if not x or any(other != x for other, _ in curves):
            continue
        base = [0.0] * len(x)
        for number, (path, (_, shares)) in enumerate(zip(PATHS, curves, strict=True)):
            top = [low + share for low, share in zip(base, shares, strict=True)]
            place = [stage.offset + value for value in x]
            series.append(Series(_spoken(path), number, place, top, "area", "path", base))
            base = top
    return series


def _budgets(stages: Sequence[Stage]) -> list[Level]:
    """The compute budgets that the stages with a reasoning engine were given."""
    budgets: list[Any] = [
        stage.setting("dre", "compute_budget") for stage in stages if stage.setting("advanced", "enable_dre")
    ]
    return [Level("budget", float(budget)) for budget in dict.fromkeys(budgets) if isinstance(budget, int | float)]


def _spoken(path: str) -> str:
    return path.replace("_", "-")
