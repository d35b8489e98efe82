"""A disk that fills up: whatever write of a save fails, the checkpoints before are whole, and the run does as told."""

import errno
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import losses
from test_checkpoint import checkpoints, manifest_at, save

from ultrathink_model.errors import CheckpointError
from ultrathink_model.training import checkpoint
from ultrathink_model.training.checkpoint import newest_valid_checkpoint, save_checkpoint

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.fsync")


class FullDisk:
    """Fails the n-th operation that takes space in a folder; an audit hook cannot be taken out, so it is switched."""

    def __init__(self) -> None:
        self.folder, self.fail_at, self.count = "", 0, 0
        sys.addaudithook(self._operate)

    def watch(self, folder: Path, fail_at: int) -> None:
        self.folder, self.fail_at, self.count = str(folder), fail_at, 0

    def rest(self) -> None:
        self.folder = ""

    def sync(self, descriptor: int) -> None:
        self._operate("os.fsync", (self.folder,))
        os_fsync(descriptor)

    def _operate(self, name: str, arguments: tuple) -> None:
        if not self.folder or name not in OPERATIONS or self.folder not in str(arguments):
            return
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")


os_fsync = os.fsync


@pytest.fixture(scope="module")
def full_disk() -> FullDisk:
    return FullDisk()


def saved_or_told(folder: Path) -> str:
    """What a save says that fails."""
    try:
        save(folder, 2)
    except CheckpointError as error:
        return str(error)
    return ""


def test_no_space_at_any_operation_of_a_save_leaves_the_checkpoint_before(tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk.sync)
    folder = tmp_path / "counted"
    folder.mkdir()
    save(folder, 1)
    full_disk.watch(folder, 0)
    save(folder, 2)
    operations = full_disk.count
    full_disk.rest()
    assert operations > 8
    failed = 0
    for fail_at in range(1, operations + 1):
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        save(folder, 1)
        full_disk.watch(folder, fail_at)
        message = saved_or_told(folder)
        full_disk.rest()
        if message:
            failed += 1
            assert "No space left" in message
            assert "The checkpoints before it are whole" in message
        _, manifest = newest_valid_checkpoint(checkpoints(folder))
        assert manifest.position.step in (1, 2)
        save(folder, 3)
        assert newest_valid_checkpoint(checkpoints(folder))[1].position.step == 3
        assert all(entry.name.startswith("checkpoint_") for entry in folder.iterdir())
    # Some opens only read what was written; every other operation must have failed the save.
    assert failed > operations / 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the limit must not reach the tests' own process")
def test_a_write_cut_by_the_system_at_any_size_leaves_the_checkpoint_before(tmp_path):
    state = {"m": {"w": torch.arange(4096.0)}}
    whole = tmp_path / "checkpoint_00000001.pt"
    save_checkpoint(whole, state, {"draws": [1]}, manifest_at(1))
    sizes = sorted({file.stat().st_size for file in whole.iterdir()})
    for limit in [0, *(size - 1 for size in sizes), *(size // 2 for size in sizes)]:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save_checkpoint(tmp_path / "checkpoint_00000002.pt", state, {"draws": [2]}, manifest_at(2))
            except CheckpointError:
                os._exit(2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2, limit
        assert [step for step, _ in checkpoints(tmp_path)] == [1]
        assert [entry.name for entry in tmp_path.iterdir()] == [whole.name]
    assert newest_valid_checkpoint(checkpoints(tmp_path)) is not None


@pytest.fixture
def fails_at_step_4(monkeypatch) -> None:
    publish = checkpoint._publish

    def full(temporary: Path, destination: Path, manifest) -> None:
        if destination.name == "checkpoint_00000004.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(temporary, destination, manifest)

    monkeypatch.setattr(checkpoint, "_publish", full)


SETTINGS = ("training.checkpoint_steps=2", "training.keep_checkpoints=9")


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_training_stops_at_a_checkpoint_that_cannot_be_written(train_tiny, fails_at_step_4, tmp_path, in_background):
    with pytest.raises(CheckpointError, match=r"checkpoint_00000004.pt cannot be written.*start the same command"):
        train_tiny(*SETTINGS, f"training.async_checkpoints={in_background}")
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2]
    assert '"failed"' in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_training_goes_on_without_it_when_asked(train_tiny, fails_at_step_4, tmp_path, in_background):
    settings = (*SETTINGS, f"training.async_checkpoints={in_background}")
    _, rows = train_tiny(*settings, "training.on_save_failure=continue")
    assert sorted(step for step, _ in checkpoints(tmp_path / "run")) == [2, 6]
    assert "training goes on without a checkpoint" in (tmp_path / "run" / "training.log").read_text()
    assert len(losses(rows)) == 6
