import logging
import os
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ultrathink_model.config.training import TrainingConfig
from ultrathink_model.errors import CheckpointError
from ultrathink_model.training import checkpoint
from ultrathink_model.training.checkpoint import (
    CheckpointManifest,
    RunPosition,
    load_tensors,
    newest_valid_checkpoint,
    read_rank_state,
    remove_leftovers,
    save_checkpoint,
    verify_checkpoint,
)
from ultrathink_model.training.retention import prune


def manifest_at(step: int) -> CheckpointManifest:
    return CheckpointManifest(
        position=RunPosition(step=step, tokens=10 * step, seconds=0.1 * step),
        config_hash="c",
        config={"model": {"hidden_size": 8}},
        tokenizer_hash="t",
        data_fingerprint="d",
        strategy="single",
        world_size=1,
        global_batch=4,
    )


def some_tensors(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return {
        "model": {"a": torch.randn(5, 3), "half": torch.randn(4).bfloat16(), "buffer": torch.arange(6)},
        "optimizer": {"a.step": torch.tensor(3.0), "none": torch.zeros(0, 2)},
    }


def empty_like(tensors: dict) -> dict:
    return {k: empty_like(v) if isinstance(v, dict) else torch.full_like(v, 7) for k, v in tensors.items()}


def save(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint_{step:08d}.pt"
    save_checkpoint(path, some_tensors(step), {"draws": [step]}, manifest_at(step))
    return path


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    return [(int(path.name[11:19]), path) for path in folder.glob("checkpoint_*.pt")]


def assert_equal(first: dict, second: dict) -> None:
    for key, value in first.items():
        if isinstance(value, dict):
            assert_equal(value, second[key])
        else:
            assert torch.equal(value, second[key]), key
            assert value.dtype == second[key].dtype


def test_a_checkpoint_gives_back_every_byte(tmp_path):
    path = save(tmp_path, 3)
    loaded = empty_like(some_tensors(3))
    load_tensors(path, loaded)
    assert_equal(some_tensors(3), loaded)
    assert read_rank_state(path, 0) == {"draws": [3]}
    assert read_rank_state(path, 1) is None
    assert verify_checkpoint(path).position == RunPosition(step=3, tokens=30, seconds=0.1 * 3)


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    path = save(tmp_path, 1)
    names = sorted(file.name for file in path.iterdir())
    assert names == ["manifest.json", "rank_00000.json", "shard-00001-model-00001-of-00001.safetensors"]
    assert set(verify_checkpoint(path).files) == set(names) - {"manifest.json"}


def test_large_state_is_split_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    path = save(tmp_path, 1)
    assert len(list(path.glob("shard-*"))) > 1
    loaded = empty_like(some_tensors(1))
    load_tensors(path, loaded)
    assert_equal(some_tensors(1), loaded)


def test_any_flipped_byte_is_named_and_the_checkpoint_before_is_taken(tmp_path, caplog):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    for file in bad.iterdir():
        content = file.read_bytes()
        for place in (0, len(content) // 3, len(content) // 2, len(content) - 3):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            caplog.clear()
            found = newest_valid_checkpoint(checkpoints(tmp_path))
            assert found is not None
            assert found[0] == good
            assert str(file) in caplog.text
        file.write_bytes(content)
    found = newest_valid_checkpoint(checkpoints(tmp_path))
    assert found is not None
    assert found[0] == bad


@pytest.mark.parametrize("harm", ["cut", "missing", "no manifest"])
def test_a_cut_checkpoint_is_passed_over(tmp_path, harm, caplog):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    shard = next(bad.glob("shard-*"))
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (shard if harm == "missing" else bad / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = newest_valid_checkpoint(checkpoints(tmp_path))
    assert found is not None
    assert found[0] == good
    assert "damaged checkpoint passed over" in caplog.text


def test_where_no_checkpoint_is_whole_none_is_found(tmp_path):
    bad = save(tmp_path, 1)
    (bad / "rank_00000.json").unlink()
    assert newest_valid_checkpoint(checkpoints(tmp_path)) is None
    assert newest_valid_checkpoint([]) is None


def test_a_model_of_another_shape_or_name_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_tensors(path, {"model": {"a": torch.zeros(5, 4)}})
    with pytest.raises(CheckpointError, match=r"does not fit this model.*other"):
        load_tensors(path, {"model": {"other": torch.zeros(5, 4)}})


def test_saving_again_at_a_step_replaces_what_stands_there(tmp_path):
    path = save(tmp_path, 1)
    save_checkpoint(path, some_tensors(9), {"draws": [9]}, manifest_at(1))
    loaded = empty_like(some_tensors())
    load_tensors(path, loaded)
    assert_equal(some_tensors(9), loaded)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    prune(checkpoints(tmp_path), TrainingConfig(keep_checkpoints=2))
    assert sorted(step for step, _ in checkpoints(tmp_path)) == [3, 4]


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(CheckpointError, match=r"needs 17 MB and its disk has 0 MB free"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_fails_the_save_and_leaves_the_one_before(tmp_path, monkeypatch):
    good = save(tmp_path, 1)

    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sha256", full)
    with pytest.raises(CheckpointError, match=r"checkpoint_00000002.pt cannot be written.*No space left"):
        save(tmp_path, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == [good.name]


def killed_save(folder: Path, stop_at: int) -> tuple[int, int]:
    """Saves twice, then once more in a child process that kills itself at its `stop_at`-th file operation.

    Returns:
        The child's exit status, and the operations it counted when it lived.
    """
    folder.mkdir()
    save(folder, 1)
    save(folder, 2)
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        counted = folder.with_suffix(".count")
        return status, int(counted.read_text()) if counted.exists() else 0
    operations = 0

    def operate(name: str, arguments: tuple) -> None:
        nonlocal operations
        if name in WATCHED and str(folder) in str(arguments):
            operations += 1
            if operations == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(operate)
    fsync = os.fsync
    os.fsync = lambda descriptor: (operate("os.fsync", (folder,)), fsync(descriptor))
    save(folder, 3)
    prune(checkpoints(folder), TrainingConfig(keep_checkpoints=2))
    folder.with_suffix(".count").write_text(str(operations))
    os._exit(0)


WATCHED = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.fsync")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the child must be forked")
def test_kill_at_every_file_operation_of_a_save_leaves_a_checkpoint_to_go_on_from(tmp_path):
    status, operations = killed_save(tmp_path / "whole", 0)
    assert status == 0
    assert operations > 15
    for stop_at in range(1, operations + 1):
        folder = tmp_path / str(stop_at)
        status, _ = killed_save(folder, stop_at)
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = newest_valid_checkpoint(checkpoints(folder))
        assert found is not None
        path, manifest = found
        assert manifest.position.step in (2, 3)
        loaded = empty_like(some_tensors())
        load_tensors(path, loaded)
        assert_equal(some_tensors(manifest.position.step), loaded)
        remove_leftovers(folder)
        assert all(entry.name.startswith("checkpoint_") for entry in folder.iterdir())
        save(folder, 3)
        assert verify_checkpoint(folder / "checkpoint_00000003.pt").position.step == 3


def test_sharded_state_of_two_ranks_loads_into_one_process(tmp_path):
    run_ranks(2, _save_sharded, tmp_path / "checkpoint_00000001.pt")
    path = tmp_path / "checkpoint_00000001.pt"
    assert set(verify_checkpoint(path).files) >= {"rank_00000.json", "rank_00001.json"}
    assert read_rank_state(path, 1) == {"rank": 1}
    loaded = {"sharded": torch.zeros(3, 2), "one_row": torch.zeros(1, 2), "same": torch.zeros(4)}
    load_tensors(path, loaded)
    assert torch.equal(loaded["sharded"], torch.arange(6.0).view(3, 2))
    assert torch.equal(loaded["one_row"], torch.ones(1, 2))
    assert torch.equal(loaded["same"], torch.arange(4.0))


def _save_sharded(rank: int, path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensors = {
        "sharded": distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)]),
        "one_row": distribute_tensor(torch.ones(1, 2), mesh, [Shard(0)]),
        "same": torch.arange(4.0),
    }
    save_checkpoint(path, tensors, {"rank": rank}, manifest_at(1))
    dist.barrier()
    load_tensors(path, tensors)
    # A rank whose disk fails must fail the others too, not leave them waiting.
    if rank == 1:
        checkpoint._sha256 = _broken
    with pytest.raises(CheckpointError, match="rank 1: disk broke"):
        save_checkpoint(path, tensors, {"rank": rank}, manifest_at(2))
    assert verify_checkpoint(path).position.step == 1 if rank == 0 else True


def _broken(path: Path) -> str:
    raise OSError("disk broke")
