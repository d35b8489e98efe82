import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_model.reporting.chart import MOST_POINTS, Level, LineChart, Series, padded, settled_range, thinned
from ultrathink_model.reporting.quantities import duration, round_ticks, short, tick_labels


def chart_of(*series: Series, **options) -> LineChart:
    return LineChart("Title", "unit", "tokens", list(series), **options)


@given(st.floats(-1e9, 1e9), st.floats(1e-4, 1e9))
def test_ticks_are_round_few_and_within_bounds(low, relative_span):
    # Narrower axes than this share of their numbers would need more digits than a label has room for.
    span = relative_span * max(1.0, abs(low))
    high = low + span
    ticks = round_ticks(low, high, 5)
    assert len(ticks) <= 6
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)
    labels = tick_labels(ticks)
    assert len(labels) == len(ticks)


def test_ticks_of_counts_are_whole():
    assert round_ticks(0, 2, 5, least_step=1) == [0, 1, 2]


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 1e6, 2e6], ["0", "1\u202fM", "2\u202fM"]),
        ([0, 2.5e6], ["0.0", "2.5\u202fM"]),
        ([4.5, 5.0, 5.5], ["4.5", "5.0", "5.5"]),
        ([0, 2.5e-4, 5e-4], ["0", "2.5e-4", "5e-4"]),
        ([1500, 2000], ["1.5\u202fk", "2.0\u202fk"]),
        ([3.0], ["3"]),
    ],
)
def test_tick_labels_share_their_unit_and_decimals(ticks, labels):
    assert tick_labels(ticks) == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [(2_258_892, "2.26\u202fM"), (0.25, "0.25"), (12, "12"), (1e-5, "1e-05"), (float("nan"), "not finite"), (0, "0")],
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (330, "5 min 30 s"), (7260, "2 h 1 min")])
def test_durations_name_their_two_largest_units(seconds, text):
    assert duration(seconds).replace("\u202f", " ") == text


def test_higher_values_lie_higher():
    chart = chart_of(Series("a", 0, [0, 10], [1, 2]), y_range=(0, 4))
    (path,) = chart.paths()
    assert path.d == "M0.0 750.0L1000.0 500.0"


def test_a_single_point_is_drawn_as_a_dot():
    (path,) = chart_of(Series("a", 0, [5], [1])).paths()
    assert path.classes == "dots stage-0"


def test_equal_values_have_an_axis():
    chart = chart_of(Series("a", 0, [0, 1, 2], [3, 3, 3]))
    assert [label.text for label in chart.y_ticks()]
    assert "nan" not in chart.paths()[0].d


def test_levels_are_within_the_axis():
    chart = chart_of(Series("a", 0, [0, 1], [3, 4]), levels=[Level("target", 9)])
    assert 0 < chart.level_labels()[0].at < 100


def test_thinning_keeps_the_ends_and_the_mean():
    count = 5000
    series = Series("a", 0, list(range(count)), [float(index % 7) for index in range(count)])
    x, y, _ = thinned(series)
    assert len(x) == MOST_POINTS
    assert (x[0], x[-1]) == (0, count - 1)
    assert x == sorted(x)
    assert sum(y) / len(y) == pytest.approx(3, abs=0.1)


def test_hover_shows_what_an_area_adds_not_where_its_edge_lies():
    chart = chart_of(Series("b", 1, [0, 1], [0.75, 0.75], "area", "path", [0.25, 0.5]), y_range=(0, 1), percent=True)
    (points,) = json.loads(chart.hover_data())["series"]
    assert points["y"] == ["50 %", "25 %"]


def test_first_steep_steps_do_not_set_the_scale_of_a_loss():
    losses = [100.0, 50.0] + [5 - index / 1000 for index in range(998)]
    low, high = settled_range(losses, [6.0])
    assert 3.5 < low < 4.003
    assert 6.0 < high < 7


def test_positive_quantities_have_no_negative_axis():
    assert padded(0.01, 5.0)[0] == 0
    assert padded(-1.0, 5.0)[0] < -1
