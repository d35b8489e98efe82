import logging
import shutil
import time

import pytest
from mlflow import MlflowClient

from ultrathink_model.config import override_config
from ultrathink_model.errors import ConfigError
from ultrathink_model.tracking import mlflow as tracking
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.mlflow import MlflowRun, create_parent_run, end_parent_run
from ultrathink_model.tracking.mlflow_store import MlflowStore, config_params, redacted_config
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity
from ultrathink_model.tracking.upload import Artifact, Uploader, UploadState


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def config(tiny_config, tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return override_config(
        tiny_config,
        [
            f"logging.mlflow_tracking_uri=sqlite:///{tmp_path / 'mlflow.db'}",
            f"logging.mlflow_artifact_dir={tmp_path / 'mlartifacts'}",
            "logging.system_metrics=false",
        ],
    )


@pytest.fixture
def folder(config):
    folder = RunFolder(config.output.output_dir)
    folder.begin(RunIdentity.of(config, "baseline"), config)
    return folder


@pytest.fixture
def client(config):
    return MlflowClient(config.logging.mlflow_tracking_uri)


@pytest.fixture
def fast_polling(monkeypatch):
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "FIRST_RETRY_SECONDS", 0.05)


def write_steps(folder, steps, scale=1.0):
    writer = MetricsWriter(folder.metrics_file)
    for step in steps:
        writer.write(step, {"tokens": 100 * step, "train/loss": scale * step})


def make_uploader(config, folder, store=None):
    state = UploadState.load(folder.mlflow_file)
    return Uploader(store or MlflowStore(config.logging), config, folder, state, run_name="baseline", tags={})


def history(client, run_id, name="train/loss"):
    points = [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
    assert len({step for step, _ in points}) == len(points), "a step was sent twice"
    return sorted(points)


class FailingStore(MlflowStore):
    """The real store behind a line that breaks: `fail_after` sends the batch and loses the answer."""

    fail_before = False
    fail_after = False

    def send_points(self, run_id, points):
        if self.fail_before:
            raise ConnectionError("lost on the way")
        super().send_points(run_id, points)
        if self.fail_after:
            raise ConnectionError("answer lost")


def test_run_has_every_line_the_config_its_parent_and_its_artifacts(config, folder, client, tmp_path):
    parent = create_parent_run(config, "production")
    (folder.path / "samples").mkdir()
    (folder.path / "samples" / "a.txt").write_text("text")
    folder.report_file.write_text("<html>")
    run = MlflowRun.start(config, "baseline", folder, parent_run_id=parent, tags={"stage": "pretrain"})
    write_steps(folder, range(1, 6))
    run.log_artifact(folder.report_file)
    run.log_artifact(folder.path / "samples", "texts")
    run.finish()
    end_parent_run(config, parent)

    stored = client.get_run(run.run_id)
    assert folder.record().mlflow_run_id == run.run_id
    assert history(client, run.run_id) == [(step, float(step)) for step in range(1, 6)]
    assert stored.data.metrics["tokens"] == 500
    assert stored.data.params["training.max_steps"] == "6"
    assert stored.data.tags["mlflow.parentRunId"] == parent
    assert stored.data.tags["stage"] == "pretrain"
    assert (stored.info.run_name, stored.info.status) == ("baseline", "FINISHED")
    assert client.get_run(parent).info.status == "FINISHED"
    root = tmp_path / "mlartifacts" / "ultrathink" / run.run_id / "artifacts"
    assert {str(path.relative_to(root)) for path in root.rglob("*.*")} == {
        "config.yaml",
        "report.html",
        "texts/samples/a.txt",
    }


def test_runs_and_their_artifacts_are_in_the_named_experiment(config, folder, client, tmp_path):
    named = override_config(config, ["logging.experiment_name=house style/2"])
    run = MlflowRun.start(named, "baseline", folder)
    run.log_artifact(folder.config_file)
    run.finish()
    experiment = client.get_experiment_by_name("house style/2")
    assert client.get_run(run.run_id).info.experiment_id == experiment.experiment_id
    assert client.get_experiment_by_name("ultrathink") is None
    assert (tmp_path / "mlartifacts" / "house_style_2" / run.run_id / "artifacts" / "config.yaml").is_file()


def test_starting_a_run_does_not_wait_for_mlflow(config, folder):
    unreachable = override_config(config, ["logging.mlflow_tracking_uri=http://127.0.0.1:9"])
    started = time.monotonic()
    run = MlflowRun.start(unreachable, "baseline", folder)
    assert time.monotonic() - started < 0.5
    assert run.run_id is None
    run.finish(wait_seconds=0.1)


def test_lines_come_while_the_run_goes_on(config, folder, client, fast_polling):
    run = MlflowRun.start(config, "baseline", folder)
    for last in (3, 6):
        write_steps(folder, range(last - 2, last + 1))
        deadline = time.monotonic() + 20
        while run.run_id is None or len(history(client, run.run_id)) < last:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    run.finish("KILLED")
    assert client.get_run(run.run_id).info.status == "KILLED"


def test_resumed_run_goes_on_in_the_same_mlflow_run_without_sending_a_step_twice(config, folder, client):
    run = MlflowRun.start(config, "baseline", folder)
    write_steps(folder, range(1, 9))
    run.finish("KILLED")
    MetricsWriter(folder.metrics_file).truncate_after(5)
    resumed = MlflowRun.start(config, "baseline", folder)
    write_steps(folder, range(6, 12))
    resumed.finish()
    assert resumed.run_id == run.run_id
    assert history(client, run.run_id) == [(step, float(step)) for step in range(1, 12)]
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_metric_that_a_sent_step_did_not_have_is_sent_after_a_resume(config, folder, client):
    write_steps(folder, range(1, 4))
    make_uploader(config, folder).deliver(last=False)
    MetricsWriter(folder.metrics_file).truncate_after(2)
    MetricsWriter(folder.metrics_file).write(3, {"train/loss": 3.0, "val/loss": 2.5})
    uploader = make_uploader(config, folder)
    uploader.deliver(last=True)
    assert history(client, uploader.run_id, "val/loss") == [(3, 2.5)]
    assert len(history(client, uploader.run_id)) == 3


def test_file_rewritten_under_a_running_upload_is_read_from_its_start(config, folder, client):
    write_steps(folder, range(1, 6))
    uploader = make_uploader(config, folder)
    uploader.deliver(last=False)
    writer = MetricsWriter(folder.metrics_file)
    writer.truncate_after(2)
    for step in range(3, 8):
        writer.write(step, {"a much longer name, so that the file soon passes its old length": 1, "train/loss": step})
    uploader.deliver(last=True)
    assert [step for step, _ in history(client, uploader.run_id)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("failure", ["fail_before", "fail_after"])
@pytest.mark.parametrize("restart", [False, True])
def test_batch_without_an_answer_is_sent_exactly_once(config, folder, client, failure, restart):
    write_steps(folder, range(1, 4))
    store = FailingStore(config.logging)
    uploader = make_uploader(config, folder, store)
    uploader.deliver(last=False)
    write_steps(folder, range(4, 8))
    setattr(store, failure, True)
    with pytest.raises(ConnectionError):
        uploader.deliver(last=False)
    setattr(store, failure, False)
    if restart:
        # MLflow keeps points of one step that differ in time, so times differ as after a rewrite by a resumed run.
        MetricsWriter(folder.metrics_file).truncate_after(3)
        write_steps(folder, range(4, 8))
        uploader = make_uploader(config, folder)
    uploader.deliver(last=True)
    assert history(client, uploader.run_id) == [(step, float(step)) for step in range(1, 8)]


def test_process_killed_before_it_noted_the_run_id_finds_its_run_again(config, folder):
    uploader = make_uploader(config, folder)
    uploader.deliver(last=False)
    state = UploadState.load(folder.mlflow_file)
    state.run_id = None
    folder.mlflow_file.write_text(state.model_dump_json())
    again = make_uploader(config, folder)
    again.deliver(last=False)
    assert again.run_id == uploader.run_id


def test_run_deleted_from_mlflow_is_sent_whole_to_a_new_one(config, folder, client):
    write_steps(folder, range(1, 4))
    uploader = make_uploader(config, folder)
    uploader.deliver(last=False)
    deleted = uploader.run_id
    client.delete_run(deleted)
    write_steps(folder, range(4, 6))
    error = tracking.attempt(lambda: uploader.deliver(last=False))
    assert error is not None
    uploader.deliver(last=True)
    assert uploader.run_id != deleted
    assert [step for step, _ in history(client, uploader.run_id)] == [1, 2, 3, 4, 5]


def test_store_that_is_down_is_tried_again_and_gets_everything(config, folder, tmp_path, fast_polling, caplog):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the database's folder should be")
    down = override_config(config, [f"logging.mlflow_tracking_uri=sqlite:///{blocked}/mlflow.db"])
    run = MlflowRun.start(down, "baseline", folder)
    write_steps(folder, range(1, 4))
    deadline = time.monotonic() + 20
    while "trying again" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    blocked.unlink()
    blocked.mkdir()
    shutil.copy(tmp_path / "mlflow.db", blocked / "mlflow.db")
    run.finish()
    assert len(history(MlflowClient(down.logging.mlflow_tracking_uri), run.run_id)) == 3


def test_what_a_store_that_is_down_did_not_take_is_named_and_sent_by_the_next_start(
    config, folder, client, fast_polling, caplog
):
    down = override_config(config, ["logging.mlflow_tracking_uri=http://127.0.0.1:9"])
    run = MlflowRun.start(down, "baseline", folder)
    write_steps(folder, range(1, 4))
    run.log_artifact(folder.config_file)
    started = time.monotonic()
    run.finish(wait_seconds=2.0)
    assert time.monotonic() - started < 3.0
    assert "has not taken 3 lines of metrics and 1 artifacts" in caplog.text
    again = MlflowRun.start(config, "baseline", folder)
    again.finish()
    assert len(history(client, again.run_id)) == 3
    assert client.get_run(again.run_id).info.status == "FINISHED"


def test_parent_of_a_store_that_is_down_is_none_with_a_warning(config, tmp_path, caplog):
    (tmp_path / "blocked").write_text("")
    down = override_config(config, [f"logging.mlflow_tracking_uri=sqlite:///{tmp_path}/blocked/mlflow.db"])
    with caplog.at_level(logging.WARNING):
        assert create_parent_run(down, "production") is None
    assert "the stages have no common run" in caplog.text


def test_more_points_than_one_request_takes_arrive_in_order(config, folder, client):
    writer = MetricsWriter(folder.metrics_file)
    for step in range(1, 4):
        writer.write(step, {f"train/moe/load/{expert}": step for expert in range(1500)})
    uploader = make_uploader(config, folder)
    uploader.deliver(last=True)
    assert history(client, uploader.run_id, "train/moe/load/1499") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(client.get_run(uploader.run_id).data.metrics) == 1500


def test_missing_artifact_is_named_and_does_not_block_the_others(config, folder, caplog):
    uploader = make_uploader(config, folder)
    uploader.queue(Artifact(path=str(folder.path / "gone"), folder=""))
    uploader.queue(Artifact(path=str(folder.config_file), folder="second"))
    uploader.deliver(last=True)
    assert "gone is gone" in caplog.text
    assert UploadState.load(folder.mlflow_file).artifacts == []


def test_system_metrics_are_sent_beside_the_others(config, folder, client):
    sampled = override_config(config, ["logging.system_metrics=true"])
    run = MlflowRun.start(sampled, "baseline", folder)
    run.finish()
    stored = client.get_run(run.run_id).data.metrics
    assert 0 <= stored["system/cpu_utilization_percentage"] <= 100
    assert stored["system/process_memory_megabytes"] > 10


@pytest.mark.parametrize("uri", ["file:./mlruns", "./mlruns", "mlruns"])
def test_folder_as_a_store_is_refused_before_the_run_begins(config, folder, uri):
    refused = override_config(config, [f"logging.mlflow_tracking_uri={uri}"])
    with pytest.raises(ConfigError, match="take sqlite"):
        MlflowRun.start(refused, "baseline", folder)


def test_password_in_an_address_reaches_neither_params_nor_artifacts(config):
    secret = override_config(config, ["logging.mlflow_tracking_uri=postgresql://user:hunter2@db/mlflow"])
    assert config_params(secret)["logging.mlflow_tracking_uri"] == "postgresql://***@db/mlflow"
    assert config_params(secret)["rlhf.response_tokens"] != "***"
    assert "hunter2" not in redacted_config(secret)
    assert "hunter2" not in MlflowStore(secret.logging).safe_uri


def test_a_store_named_relative_to_the_folder_is_that_folders(config, tmp_path, empty_database, monkeypatch):
    relative = override_config(config, ["logging.mlflow_tracking_uri=sqlite:///mlflow.db"]).logging
    ids = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        shutil.copy(empty_database, tmp_path / name / "mlflow.db")
        monkeypatch.chdir(tmp_path / name)
        store = MlflowStore(relative)
        ids.append(store.client.create_experiment("only here and there"))
    assert ids[0] == ids[1]  # each is the first of its store; in one store the second would be refused
