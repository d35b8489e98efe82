import json
import os
import time

import pytest

from ultrathink_model.config import load_config, override_config
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def begin(folder, config, name="baseline", init_from=None, fresh=False):
    return folder.begin(RunIdentity.of(config, name, init_from), config, fresh=fresh)


def fill(folder, marker):
    folder.metrics_file.write_text(marker)
    folder.checkpoint(3).mkdir()
    (folder.checkpoint(3) / "data").write_text(marker)
    folder.final_model.mkdir(exist_ok=True)
    (folder.final_model / "weights").write_text(marker)


def test_first_start_writes_a_loadable_config_and_a_running_record(folder, tiny_config):
    assert not begin(folder, tiny_config)
    assert load_config(folder.config_file) == tiny_config
    record = folder.record()
    assert (record.run_name, record.status, record.mlflow_run_id) == ("baseline", "running", None)


def test_same_run_goes_on_and_keeps_its_files_and_mlflow_run(folder, tiny_config):
    begin(folder, tiny_config)
    fill(folder, "first")
    folder.set_mlflow_run_id("abc")
    folder.set_status("stopped")
    assert begin(folder, tiny_config)
    assert folder.metrics_file.read_text() == "first"
    assert folder.record().mlflow_run_id == "abc"
    assert folder.record().status == "running"
    assert not (folder.path / "previous").exists()


def test_time_leaves_out_the_pause_before_a_killed_run_went_on(folder, tiny_config):
    begin(folder, tiny_config)
    record = json.loads(folder.run_file.read_text())
    now = time.time()
    # Begun an hour ago, last heard of ten minutes later, and killed.
    times = {"started_at": now - 3600, "resumed_at": now - 3600, "updated_at": now - 3600}
    folder.run_file.write_text(json.dumps(record | times))
    folder.metrics_file.write_text("{}\n")
    os.utime(folder.metrics_file, (now - 3000, now - 3000))
    assert begin(folder, tiny_config)
    assert folder.record().seconds(time.time() + 60) == pytest.approx(660, abs=10)


@pytest.mark.parametrize(
    "override",
    ["logging.log_steps=7", "distributed.enabled=true", "training.resume=somewhere", "export.formats=[onnx]"],
)
def test_what_does_not_change_the_result_does_not_make_another_run(folder, tiny_config, override):
    begin(folder, tiny_config)
    assert begin(folder, override_config(tiny_config, [override]))


def test_another_run_moves_the_old_files_away_but_not_the_model_it_starts_from(folder, tiny_config):
    begin(folder, tiny_config)
    fill(folder, "first")
    changed = override_config(tiny_config, ["training.learning_rate=0.5"])
    assert not begin(folder, changed, "advanced", folder.final_model)
    previous = folder.path / "previous" / "baseline"
    assert (previous / "metrics.jsonl").read_text() == "first"
    assert (previous / "checkpoint_00000003.pt" / "data").read_text() == "first"
    assert json.loads((previous / "run.json").read_text())["run_name"] == "baseline"
    assert (folder.final_model / "weights").read_text() == "first"
    assert not folder.checkpoints()
    assert not folder.metrics_file.exists()


@pytest.mark.parametrize("change", ["name", "init_from", "config"])
def test_name_weights_and_config_each_make_another_run(folder, tiny_config, tmp_path, change):
    begin(folder, tiny_config)
    config = override_config(tiny_config, ["training.seed=1"]) if change == "config" else tiny_config
    name = "other" if change == "name" else "baseline"
    assert not begin(folder, config, name, tmp_path if change == "init_from" else None)


def test_moved_runs_of_one_name_do_not_overwrite_each_other(folder, tiny_config):
    for marker in ("one", "two", "three"):
        begin(folder, tiny_config, fresh=True)
        fill(folder, marker)
    begin(folder, tiny_config, fresh=True)
    texts = {path.name: (path / "metrics.jsonl").read_text() for path in (folder.path / "previous").iterdir()}
    assert texts == {"baseline": "one", "baseline-2": "two", "baseline-3": "three"}


def test_cut_move_is_taken_up_again(folder, tiny_config):
    begin(folder, tiny_config)
    fill(folder, "first")
    previous = folder.path / "previous" / "baseline"
    previous.mkdir(parents=True)
    folder.checkpoint(3).rename(previous / folder.checkpoint(3).name)
    begin(folder, tiny_config, "other")
    assert {path.name for path in previous.iterdir()} == {
        "checkpoint_00000003.pt",
        "metrics.jsonl",
        "config.yaml",
        "run.json",
    }


def test_files_that_no_run_of_ours_wrote_stay(folder, tiny_config):
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "training.log").write_text("mine")
    begin(folder, tiny_config)
    begin(folder, tiny_config, "other")
    assert (folder.path / "notes.txt").read_text() == "mine"


def test_checkpoints_are_listed_by_step_and_unfinished_ones_are_not(folder):
    folder.path.mkdir()
    for name in ("checkpoint_00000020.pt", "checkpoint_00000003.pt", ".checkpoint_00000030.pt.tmp", "checkpoint_x.pt"):
        (folder.path / name).mkdir()
    assert [step for step, _ in folder.checkpoints()] == [3, 20]
    assert folder.checkpoint(20) == folder.checkpoints()[1][1]


def test_unreadable_record_counts_as_another_run(folder, tiny_config):
    begin(folder, tiny_config)
    fill(folder, "first")
    folder.run_file.write_text('{"identity": ')
    assert not begin(folder, tiny_config)
    assert (folder.path / "previous" / "unnamed" / "metrics.jsonl").exists()


def test_run_name_cannot_leave_the_folder(folder, tiny_config):
    begin(folder, tiny_config, "../../outside")
    begin(folder, tiny_config, "next")
    assert [path.name for path in (folder.path / "previous").iterdir()] == ["_.._outside"]
