"""Line and area charts as plain SVG that needs no script to be seen.

The drawing stretches to the page's width while its labels, which are HTML beside it, keep their size: a phone shows
the same chart with the same type. A chart carries its numbers, from which the page's script makes the hover.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ultrathink_model.reporting.quantities import round_ticks, short, tick_labels

# The drawing's own units; it is stretched to whatever size the page gives it.
EXTENT = 1000.0
# More points than this cannot be told apart on a screen; means of neighbours stand for them.
MOST_POINTS = 240
MOST_MARKS = 60

Style = Literal["line", "faint", "marked", "area"]


@dataclass(frozen=True)
class Series:
    """One curve. `base` is the lower edge of an area; `colour` is an index into the palette of the page."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    style: Style = "line"
    palette: Literal["stage", "path"] = "stage"
    base: Sequence[float] | None = None
    in_legend: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, such as a baseline's loss or a target."""

    label: str
    y: float


@dataclass(frozen=True)
class Label:
    """A piece of text at a place of the drawing, in percent of its width or height."""

    at: float
    text: str


@dataclass(frozen=True)
class Path:
    """One drawn curve."""

    classes: str
    d: str


@dataclass(frozen=True)
class LineChart:
    """Curves over a common axis.

    Args:
        y_range: Bounds of the vertical axis; None takes those of the curves and levels.
        starts: Where the stages begin on the horizontal axis, with their names.
    """

    title: str
    y_unit: str
    x_unit: str
    series: Sequence[Series]
    levels: Sequence[Level] = ()
    starts: Sequence[tuple[float, str]] = ()
    y_range: tuple[float, float] | None = None
    note: str = ""
    wide: bool = False
    percent: bool = False

    def x_ticks(self) -> list[Label]:
        """Labels of the horizontal axis, from the left."""
        ticks = round_ticks(*self._x_bounds, 5, least_step=1.0)
        return [Label(self._across(tick), text) for tick, text in zip(ticks, tick_labels(ticks), strict=True)]

    def y_ticks(self) -> list[Label]:
        """Labels of the vertical axis, from the top."""
        ticks = round_ticks(*self._y_bounds, 5)
        texts = [f"{tick * 100:g} %" for tick in ticks] if self.percent else tick_labels(ticks)
        return [Label(self._down(tick), text) for tick, text in zip(ticks, texts, strict=True)]

    def level_labels(self) -> list[Label]:
        """The levels, by name."""
        return [Label(self._down(level.y), level.label) for level in self.levels]

    def start_labels(self) -> list[Label]:
        """Where each stage begins."""
        return [Label(self._across(x), text) for x, text in self.starts]

    def paths(self) -> list[Path]:
        """The curves, faint ones first so that the others lie on top of them."""
        ordered = sorted(self.series, key=lambda series: series.style != "faint")
        return [path for series in ordered for path in self._draw(series)]

    def legend(self) -> list[Series]:
        """The series that the legend names, each label once; empty where one curve needs no legend."""
        named = {series.label: series for series in self.series if series.in_legend}
        return list(named.values()) if len(named) > 1 else []

    def summary(self) -> str:
        """The chart in words, for those who cannot see it."""
        parts = [f"{series.label} from {short(series.y[0])} to {short(series.y[-1])}" for series in self.series]
        return f"{self.title}, {self.y_unit} over {self.x_unit}: {'; '.join(parts)}"

    def hover_data(self) -> str:
        """The numbers behind the drawing, as JSON for the page's script."""
        points = []
        for series in self.series:
            x, y, base = thinned(series)
            values = [high - low for high, low in zip(y, base, strict=True)] if series.base is not None else y
            points.append(
                {
                    "label": series.label,
                    "colour": f"{series.palette}-{series.colour}",
                    "at": [round(self._across(value), 2) for value in x],
                    "x": [short(value, 4) for value in x],
                    "y": [f"{value * 100:.3g} %" if self.percent else short(value, 4) for value in values],
                }
            )
        return json.dumps({"x_unit": self.x_unit, "series": points}, separators=(",", ":"))

    @property
    def _x_bounds(self) -> tuple[float, float]:
        values = [value for series in self.series for value in series.x]
        low, high = min(values), max(values)
        # Room for the mark of a last point.
        high += 0.01 * (high - low) if any(series.style == "marked" for series in self.series) else 0.0
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    @property
    def _y_bounds(self) -> tuple[float, float]:
        if self.y_range:
            return self.y_range
        values = [value for series in self.series for value in series.y] + [level.y for level in self.levels]
        return padded(min(values), max(values))

    def _across(self, x: float) -> float:
        low, high = self._x_bounds
        return 100 * (x - low) / (high - low)

    def _down(self, y: float) -> float:
        low, high = self._y_bounds
        return 100 * (high - y) / (high - low)

    def _draw(self, series: Series) -> Iterator[Path]:
        x, y, base = thinned(series)
        colour = f"{series.palette}-{series.colour}"
        if series.style == "area":
            edge = self._points(x, y) + self._points(x[::-1], base[::-1])
            yield Path(f"area {colour}", "M" + "L".join(edge) + "Z")
            return
        points = self._points(x, y)
        # A line from a point to itself, with round ends, is a dot that the stretching leaves round.
        dots = "".join(f"M{point}h0" for point in points)
        if len(points) > 1:
            yield Path(f"{series.style} {colour}", "M" + "L".join(points))
        if len(points) == 1 or (series.style == "marked" and len(points) <= MOST_MARKS):
            yield Path(f"dots {colour}", dots)

    def _points(self, x: Sequence[float], y: Sequence[float]) -> list[str]:
        scale = EXTENT / 100
        # Far outside the drawing a point is cut off anyway, and some browsers' arithmetic with it.
        return [
            f"{self._across(a) * scale:.1f} {min(max(self._down(b) * scale, -9 * EXTENT), 9 * EXTENT):.1f}"
            for a, b in zip(x, y, strict=True)
        ]


def thinned(series: Series) -> tuple[list[float], list[float], list[float]]:
    """x, y and base of a series in at most `MOST_POINTS` points, each the mean of its neighbours; the ends stay."""
    columns = [list(series.x), list(series.y), list(series.base or [0.0] * len(series.x))]
    count = len(series.x)
    if count <= MOST_POINTS:
        return columns[0], columns[1], columns[2]
    edges = [0, *(1 + round(index * (count - 2) / (MOST_POINTS - 2)) for index in range(MOST_POINTS - 1)), count]
    x, y, base = ([_mean(column[a:b]) for a, b in itertools.pairwise(edges)] for column in columns)
    return x, y, base


def padded(low: float, high: float) -> tuple[float, float]:
    """Bounds with a little room, so that no curve lies on the frame; zero stays the edge where it is one."""
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def settled_range(values: Sequence[float], always: Sequence[float]) -> tuple[float, float]:
    """Bounds for a loss: what a training run shows after its first steep fall, and the levels in `always`.

    The first few steps of a run from scratch lie far above all the others and would press these flat.
    """
    ordered = sorted(values)
    steep = ordered[min(len(ordered) - 1, math.floor(0.96 * len(ordered)))]
    return padded(min([ordered[0], *always]), max([steep, *always]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
