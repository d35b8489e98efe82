"""A run's folder in a remote store: what is copied when, and what another machine finds there."""

import json
import shutil

import pytest

from ultrathink_model.config import make_config, override_config
from ultrathink_model.errors import CheckpointError, ConfigError
from ultrathink_model.stage import run_stage
from ultrathink_model.tracking.remote_folder import Mirror, RemoteFolder, download, fetch_run, mirrored, upload
from ultrathink_model.tracking.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def remote(tmp_path):
    return RemoteFolder(str(tmp_path / "remote"))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_checkpoint_is_copied_once_it_has_its_manifest_and_goes_when_it_goes_here(folder, remote):
    write(folder.checkpoint(2) / "shard.safetensors", "weights")
    mirror = Mirror(folder, remote)
    mirror.sync()
    assert not remote.names()
    write(folder.checkpoint(2) / "manifest.json", "{}")
    write(folder.path / ".hidden", "")
    mirror.sync()
    assert remote.names().keys() == {"checkpoint_00000002.pt/shard.safetensors", "checkpoint_00000002.pt/manifest.json"}
    shutil.rmtree(folder.checkpoint(2))
    write(folder.checkpoint(4) / "manifest.json", "{}")
    mirror.sync()
    assert remote.names().keys() == {"checkpoint_00000004.pt/manifest.json"}


def test_a_checkpoint_of_another_run_under_the_same_name_is_replaced(folder, remote):
    write(folder.checkpoint(2) / "manifest.json", "{'run': 1}")
    write(folder.checkpoint(2) / "shard.safetensors", "weights 1")
    Mirror(folder, remote).sync()
    write(folder.checkpoint(2) / "manifest.json", "{'run': 2}")
    write(folder.checkpoint(2) / "shard.safetensors", "weights 2")
    Mirror(folder, remote).sync()
    assert remote.read("checkpoint_00000002.pt/shard.safetensors") == b"weights 2"


def test_a_run_goes_on_on_another_machine_with_the_same_losses(tiny_config, tmp_path):
    config = override_config(tiny_config, ["training.checkpoint_steps=2", f"output.remote_dir={tmp_path / 'remote'}"])
    whole = override_config(tiny_config, [f"output.output_dir={tmp_path / 'whole'}"])
    run_stage(whole, run_name="run", evaluate=False)
    run_stage(override_config(config, ["training.max_steps=6"]), run_name="run", evaluate=False)
    # As a machine that was taken away after step 4 leaves it: no later checkpoint, no result.
    remote = tmp_path / "remote"
    shutil.rmtree(remote / "checkpoint_00000006.pt")
    (remote / "result.json").unlink()
    record = json.loads((remote / "run.json").read_text())
    write(remote / "run.json", json.dumps(record | {"status": "running"}))
    shutil.rmtree(config.output.output_dir)
    run_stage(config, run_name="run", evaluate=False)
    assert "goes on after step 4" in (remote / "training.log").read_text()

    def losses(path):
        rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        return [row["train/loss"] for row in rows if "train/loss" in row]

    assert losses(remote) == losses(tmp_path / "whole")
    assert (remote / "final_model" / "model.safetensors").is_file()


def test_what_this_machine_has_newer_is_not_fetched(tiny_config, tmp_path):
    config = override_config(tiny_config, [f"output.remote_dir={tmp_path / 'remote'}"])
    with mirrored(config):
        run_stage(override_config(tiny_config, ["training.max_steps=1"]), run_name="run", evaluate=False)
    log = RunFolder(config.output.output_dir).log_file
    write(log, "newer")
    fetch_run(config)
    assert log.read_text() == "newer"


def test_upload_and_download_give_the_folder_back(tmp_path):
    write(tmp_path / "a" / "b" / "c.txt", "text")
    upload(tmp_path / "a", str(tmp_path / "there"))
    download(str(tmp_path / "there"), tmp_path / "back")
    assert (tmp_path / "back" / "b" / "c.txt").read_text() == "text"
    with pytest.raises(CheckpointError, match="holds nothing"):
        download(str(tmp_path / "nowhere"), tmp_path / "back")


def test_an_address_that_no_store_has_is_refused():
    with pytest.raises(ConfigError, match=r"output\.remote_dir=moon://dust"):
        RemoteFolder("moon://dust")


def test_a_store_that_refuses_is_named(tmp_path):
    write(tmp_path / "file", "")
    config = make_config(
        {}, [f"output.remote_dir={tmp_path / 'file' / 'folder'}", f"output.output_dir={tmp_path / 'run'}"]
    )
    write(tmp_path / "run" / "report.html", "page")
    with pytest.raises(CheckpointError, match="cannot be read or written"), mirrored(config):
        pass
