import time

import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training import watch
from ultrathink_model.training.watch import OPTIMIZER, RankWatch, Sighting, describe_hang


def sighting(rank: int, count: int, *, is_waiting: bool = False, stack: str = "") -> Sighting:
    return Sighting(rank=rank, is_still=True, count=count, part=f"part {count}", is_waiting=is_waiting, stack=stack)


def test_the_rank_that_is_behind_is_named_with_its_stack():
    text = describe_hang({0: sighting(0, 7, stack="here"), 1: sighting(1, 6, stack="there")}, 2, 41.0)
    assert text.startswith("rank 1 hangs after it began part 6, and the others have waited 41 s for it.")
    assert "rank 1 stands at:\nthere" in text
    assert "here\n" not in text


def test_of_two_that_are_as_far_the_one_outside_of_exchanges_is_named():
    text = describe_hang({0: sighting(0, 6, is_waiting=True), 1: sighting(1, 6)}, 2, 41.0)
    assert text.startswith("rank 1 hangs")


def test_a_rank_that_says_nothing_is_named():
    assert describe_hang({0: sighting(0, 6)}, 2, 41.0).startswith("rank 1 does not answer")


@pytest.fixture
def watched(base_config, tmp_path, monkeypatch):
    """Two ranks' watches in one process, whose verdict is noted and not carried out."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(watch, "LAST_WORDS_SECONDS", 0.1)
    config = override_config(base_config, ["distributed.hang_seconds=0.2", f"output.output_dir={tmp_path}"])
    verdicts = []
    monkeypatch.setattr(watch.os, "_exit", verdicts.append)
    monkeypatch.setattr(watch, "leave_word", lambda error, message: bool(verdicts.append(message)) or True)
    monkeypatch.setattr(RunFolder, "set_status", lambda self, status: None)
    folder = RunFolder(tmp_path)
    watches = [RankWatch(config, RankContext(rank, rank, 2, torch.device("cpu")), folder) for rank in (0, 1)]
    for own in watches:
        for _ in range(watch.UNWATCHED_STEPS):
            own.note(OPTIMIZER)
        own.rest()
    yield watches, verdicts
    for own in watches:
        own.close()


def wait_for(verdicts, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not verdicts and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_rank_that_is_long_between_steps_is_not_taken_for_one_that_hangs(watched):
    (_, waiting), verdicts = watched
    waiting.note("to count tokens")
    wait_for(verdicts, 1.5)
    assert verdicts == []


def test_ranks_that_stand_still_within_a_step_end_the_run(watched):
    (hanging, waiting), verdicts = watched
    hanging.note("a forward pass")
    waiting.note("a forward pass")
    waiting.note("a backward pass")
    wait_for(verdicts, 10)
    assert verdicts[0].startswith("rank 0 hangs after it began a forward pass")


def test_steps_that_go_on_are_left_alone(watched):
    (first, second), verdicts = watched
    for _ in range(60):
        for own in (first, second):
            own.note("a forward pass")
        time.sleep(0.01)
    assert verdicts == []


def test_an_exchange_that_breaks_since_another_rank_has_judged_leaves_this_one_its_verdict(watched):
    watches, verdicts = watched
    for own in watches:
        own.note("a forward pass")
    time.sleep(0.25)  # past the limit, and within the last words
    for own in watches:
        own.close()
    assert len([verdict for verdict in verdicts if "have waited" in str(verdict)]) == 2
