import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from test_checkpoint import checkpoints, manifest_at
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ultrathink_model.errors import CheckpointError
from ultrathink_model.training import checkpoint, checkpoint_writer
from ultrathink_model.training.checkpoint import load_tensors, verify_checkpoint
from ultrathink_model.training.checkpoint_writer import CheckpointWriter


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Holds what is written in the background until the event is set."""
    may_write = threading.Event()
    save = checkpoint.save_checkpoint

    def wait_and_save(*arguments) -> None:
        assert may_write.wait(30)
        save(*arguments)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", wait_and_save)
    return may_write


def test_training_goes_on_while_the_state_of_the_moment_is_written(tmp_path, held):
    writer = CheckpointWriter(in_background=True)
    state = {"model": {"a": torch.ones(3), "half": torch.ones(2).bfloat16()}}
    done = []
    path = tmp_path / "checkpoint_00000001.pt"
    writer.save(path, state, {}, manifest_at(1), lambda: done.append(path.exists()))
    state["model"]["a"].mul_(5)
    assert checkpoints(tmp_path) == []
    held.set()
    writer.wait()
    assert done == [True]
    loaded = {"model": {"a": torch.zeros(3), "half": torch.zeros(2).bfloat16()}}
    load_tensors(path, loaded)
    assert torch.equal(loaded["model"]["a"], torch.ones(3))
    assert torch.equal(loaded["model"]["half"], torch.ones(2).bfloat16())


def test_one_checkpoint_is_written_at_a_time_and_each_has_its_own_state(tmp_path):
    writer = CheckpointWriter(in_background=True)
    weight = torch.zeros(4)
    for step in (1, 2, 3):
        weight.fill_(step)
        writer.save(tmp_path / f"checkpoint_{step:08d}.pt", {"m": {"w": weight}}, {}, manifest_at(step), lambda: None)
    writer.wait()
    for step, path in checkpoints(tmp_path):
        loaded = {"m": {"w": torch.zeros(4)}}
        load_tensors(path, loaded)
        assert torch.equal(loaded["m"]["w"], torch.full((4,), float(step)))


def test_what_fails_in_the_background_is_raised_by_the_next_call_and_only_once(tmp_path, monkeypatch):
    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(in_background=True)
    monkeypatch.setattr(checkpoint, "_sha256", full)
    writer.save(tmp_path / "checkpoint_00000001.pt", {"w": torch.ones(2)}, {}, manifest_at(1), lambda: None)
    with pytest.raises(CheckpointError, match="No space left"):
        writer.wait()
    monkeypatch.undo()
    writer.save(tmp_path / "checkpoint_00000002.pt", {"w": torch.ones(2)}, {}, manifest_at(2), lambda: None)
    writer.wait()
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


def test_ranks_exchange_while_their_shards_are_written(tmp_path):
    run_ranks(2, _save_and_exchange, tmp_path)


def _save_and_exchange(rank: int, folder: Path) -> None:
    writer = CheckpointWriter(in_background=True)
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)])
    for step in (1, 2, 3):
        path = folder / f"checkpoint_{step:08d}.pt"
        writer.save(path, {"sharded": sharded, "same": torch.ones(4)}, {"rank": rank}, manifest_at(step), lambda: None)
        sharded.to_local().add_(1)
        for _ in range(50):
            dist.all_reduce(torch.ones(1))
    writer.wait()
    for step in (1, 2, 3):
        path = folder / f"checkpoint_{step:08d}.pt"
        assert verify_checkpoint(path).position.step == step
        loaded = {"sharded": torch.zeros(3, 2), "same": torch.zeros(4)}
        load_tensors(path, loaded)
        assert torch.equal(loaded["sharded"], torch.arange(6.0).view(3, 2) + step - 1)
