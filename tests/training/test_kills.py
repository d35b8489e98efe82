"""Processes that are killed or stopped at any moment: nothing is lost, one process and two."""

import os
import random
import signal
import time
from pathlib import Path

import forked_runs
import pytest
from conftest import Rows
from test_resume import EVERYTHING, assert_same_run

from ultrathink_model.config import Config, override_config
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.training.checkpoint import verify_checkpoint

pytestmark = pytest.mark.slow

RANKS = ["training.batch_size=1", "distributed.enabled=true"]
Reference = tuple[Path, Rows]


def run_config(base_config: Config, folder: Path, ranks: int, *more: str) -> Config:
    overrides = [*EVERYTHING, "training.ema_decay=0.9", f"output.output_dir={folder}"]
    return override_config(base_config, [*overrides, *(RANKS if ranks > 1 else []), *more])


@pytest.fixture(scope="module", params=[1, 2], ids=["one_process", "two_ranks"])
def reference(request, base_config, manifest, tmp_path_factory) -> tuple[int, Reference]:
    """The number of ranks, and their run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    processes = forked_runs.start(run_config(base_config, folder, request.param), manifest, request.param)
    assert set(forked_runs.exit_codes(processes)) == {0}
    return request.param, (folder, read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment_and_twice_a_run_goes_on_bitwise(base_config, manifest, tmp_path, reference, seed):
    ranks, uninterrupted = reference
    draw = random.Random(seed)
    folder = tmp_path / "killed"
    config = run_config(base_config, folder, ranks, f"data.num_workers={int(seed % 5 == 4)}")
    for step in sorted(draw.sample(range(1, 15), 2)):
        processes = forked_runs.start(config, manifest, ranks)
        forked_runs.wait_for_step(processes, folder, step)
        time.sleep(draw.random() * 0.1)
        processes[draw.randrange(ranks)].kill()
        # The other rank finds its connection closed, and ends by itself.
        codes = forked_runs.exit_codes(processes, seconds=30)
        assert -signal.SIGKILL in codes
        assert None not in codes
    assert set(forked_runs.exit_codes(forked_runs.start(config, manifest, ranks))) == {0}
    assert_same_run(folder, *uninterrupted)


class StopIn(forked_runs.Hook):
    """Sends a signal to a rank itself, in the midst of a moment that is named."""

    def __init__(self, moment: str, number: signal.Signals, rank: int) -> None:
        self.moment, self.number, self.rank = moment, number, rank

    def install(self, rank: int) -> None:
        from ultrathink_model.training import checkpoint
        from ultrathink_model.training.callbacks.evaluation import EvaluationCallback
        from ultrathink_model.training.trainer import Trainer

        if rank != self.rank:
            return
        owner, name = {
            "first step": (Trainer, "_begin"),
            "warm-up": (Trainer, "forward"),
            "evaluation": (EvaluationCallback, "_evaluate"),
            "saving": (checkpoint, "_finish_own_files"),
        }[self.moment]
        original = getattr(owner, name)
        calls = []

        def signalled(*arguments):
            calls.append(None)
            if len(calls) == (3 if self.moment == "warm-up" else 1):
                os.kill(os.getpid(), self.number)
            return original(*arguments)

        setattr(owner, name, signalled)


@pytest.mark.parametrize("moment", ["first step", "warm-up", "evaluation", "saving"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_at_any_moment_saves_and_ends_all_ranks(base_config, manifest, tmp_path, reference, moment, number):
    ranks, uninterrupted = reference
    folder = tmp_path / "stopped"
    config = run_config(base_config, folder, ranks)
    began = time.monotonic()
    processes = forked_runs.start(config, manifest, ranks, StopIn(moment, number, rank=ranks - 1))
    assert set(forked_runs.exit_codes(processes, seconds=30)) == {75}
    assert time.monotonic() - began < 30
    for path in folder.glob("checkpoint_*.pt"):
        verify_checkpoint(path)
    assert set(forked_runs.exit_codes(forked_runs.start(config, manifest, ranks))) == {0}
    assert_same_run(folder, *uninterrupted)


class SlowSave(forked_runs.Hook):
    """Ranks that save for long, one of which is told to stop in its sixth step."""

    def install(self, rank: int) -> None:
        from ultrathink_model.training import checkpoint

        finish = checkpoint._finish_own_files

        def finish_late(*arguments):
            time.sleep(8)
            return finish(*arguments)

        checkpoint._finish_own_files = finish_late
        if rank == 1:
            from ultrathink_model.training.trainer import Trainer

            forward, calls = Trainer.forward, []

            def forward_until_told(*arguments):
                calls.append(None)
                if len(calls) == 11:
                    os.kill(os.getpid(), signal.SIGTERM)
                return forward(*arguments)

            Trainer.forward = forward_until_told


def test_a_save_that_takes_longer_than_a_hang_is_not_taken_for_one(base_config, manifest, tmp_path):
    folder = tmp_path / "slow"
    config = run_config(base_config, folder, 2, "distributed.hang_seconds=1", "training.checkpoint_steps=99")
    processes = forked_runs.start(config, manifest, 2, SlowSave())
    assert set(forked_runs.exit_codes(processes, seconds=60)) == {75}
    assert [verify_checkpoint(path) for path in folder.glob("checkpoint_*.pt")]


class HangAt(forked_runs.Hook):
    """A rank that stands still in the forward pass of a step, or is stopped by the system there."""

    def __init__(self, rank: int, *, is_stopped: bool) -> None:
        self.rank, self.is_stopped = rank, is_stopped

    def install(self, rank: int) -> None:
        from ultrathink_model.models.transformer import Transformer

        forward = Transformer.forward
        calls = []

        def hang(*arguments, **keywords):
            calls.append(None)
            if len(calls) == 11:  # the sixth step's first micro-batch of two
                if self.is_stopped:
                    os.kill(os.getpid(), signal.SIGSTOP)
                a_call_that_does_not_return()
            return forward(*arguments, **keywords)

        if rank == self.rank:
            Transformer.forward = hang


def a_call_that_does_not_return() -> None:
    time.sleep(600)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_rank_that_hangs_ends_the_run_and_is_named(base_config, manifest, tmp_path, strategy, is_stopped):
    folder = tmp_path / "hung"
    config = run_config(
        base_config, folder, 2, f"distributed.strategy={strategy}", "distributed.hang_seconds=4", "logging.log_steps=1"
    )
    began = time.monotonic()
    processes = forked_runs.start(config, manifest, 2, HangAt(rank=1, is_stopped=is_stopped))
    processes[0].join(60)
    assert processes[0].exitcode == 2
    assert time.monotonic() - began < 60
    forked_runs.kill(processes)
    errors = (folder / "training.log").read_text()
    if is_stopped:
        assert "rank 1 does not answer" in errors
    else:
        assert "rank 1 hangs after it began a forward pass" in errors
        assert "a_call_that_does_not_return" in errors
    assert "rank 0 stands at" not in errors
    assert '"failed"' in (folder / "run.json").read_text()
