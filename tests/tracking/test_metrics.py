import json
import math
import os
import resource
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_model.tracking.metrics import MetricsWriter, read_metrics

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def test_line_holds_step_time_and_the_metrics_by_their_names(tmp_path):
    MetricsWriter(tmp_path / "metrics.jsonl").write(5, {"tokens": 4096, "train/loss": 2.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line)
    assert abs(values.pop("time") - time.time()) < 60
    assert values == {"step": 5, "tokens": 4096, "train/loss": 2.5}


@given(st.lists(st.dictionaries(st.text(min_size=1).filter(lambda n: n not in ("step", "time")), FINITE)))
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step, row in enumerate(rows):
        writer.write(step, row)
    read = read_metrics(path)
    assert [row.pop("step") for row in read] == list(range(len(rows)))
    assert [{k: v for k, v in row.items() if k != "time"} for row in read] == rows


def test_numbers_that_are_not_finite_are_null_in_the_file_and_missing_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "tokens": 1})
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert values["train/loss"] is None
    assert read_metrics(path)[0].keys() == {"step", "time", "tokens"}


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 8):
        writer.write(step, {"train/loss": step})
    writer.truncate_after(4)
    writer.write(5, {"train/loss": 50.0})
    assert [(row["step"], row["train/loss"]) for row in read_metrics(path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]


def test_torn_last_line_is_cut_off_by_the_next_start_and_never_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(1, {"train/loss": 3.0})
    with path.open("a") as file:
        file.write('{"step": 2, "train/lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
    MetricsWriter(path).write(2, {"train/loss": 2.0})
    assert [row["train/loss"] for row in read_metrics(path)] == [3.0, 2.0]


def test_full_disk_raises_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, {"train/loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel takes ten more bytes of the file and refuses the rest, as a disk that fills up in a line does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="only 10 of"):
            writer.write(2, {"train/loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
        with pytest.raises(OSError, match="too large"):
            writer.write(2, {"train/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.write(3, {"train/loss": 3.0})
    assert path.read_bytes().count(b"\n") == 2
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_missing_file_reads_as_no_lines(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
    MetricsWriter(tmp_path / "none.jsonl").truncate_after(3)
    assert os.listdir(tmp_path) == []
