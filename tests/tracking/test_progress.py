import io
import re
import time

import pytest

from ultrathink_model.tracking.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_at_log_steps_and_at_the_end():
    stream = io.StringIO()
    with Progress("pretrain", 25, log_steps=10, stage=2, stages=5, stream=stream) as progress:
        for step in range(1, 26):
            progress.update(step, loss=3.0, tokens_per_second=12_345.6)
    lines = stream.getvalue().splitlines()
    assert [int(re.search(r"step (\d+)/25", line)[1]) for line in lines] == [1, 10, 20, 25]
    assert all(line.startswith("stage 2/5 pretrain: ") for line in lines)
    assert "loss 3.0000, 12,346 tokens/s, 0:00:00 left" in lines[-1]


def test_resumed_run_counts_from_its_first_step():
    stream = io.StringIO()
    with Progress("pretrain", 40, log_steps=10, first_step=17, stream=stream) as progress:
        for step in range(18, 41):
            progress.update(step)
    assert [int(re.search(r"step (\d+)/40", line)[1]) for line in stream.getvalue().splitlines()] == [18, 20, 30, 40]


def test_time_left_counts_no_pause_before_the_first_step(monkeypatch):
    clock = iter([1000.0, 1002.0])
    stream = io.StringIO()
    with Progress("advanced", 5, log_steps=1, stream=stream) as progress:
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        progress.update(1)
        progress.update(2)
    assert stream.getvalue().splitlines() == ["advanced: step 1/5", "advanced: step 2/5, 0:00:06 left"]


def test_run_without_a_known_end_shows_no_time_left():
    stream = io.StringIO()
    with Progress("rlhf", None, log_steps=1, stream=stream) as progress:
        progress.update(1, loss=1.0)
    assert stream.getvalue() == "rlhf: step 1, loss 1.0000\n"


@pytest.mark.filterwarnings("error")
def test_terminal_shows_a_live_line_and_messages_keep_their_brackets(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress("pretrain", 3, log_steps=10, stage=1, stages=2, stream=stream) as progress:
        for step in range(1, 4):
            progress.update(step, loss=2.0, tokens_per_second=100)
        progress.message("saved [bold]checkpoint[/bold]")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "stage 1/2 pretrain" in shown
    assert "step 3/3, loss 2.0000, 100 tokens/s, 0:00:00 left" in shown
    assert "saved [bold]checkpoint[/bold]" in shown
