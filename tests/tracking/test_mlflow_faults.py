"""MLflow's real server going down, and the tracked process being killed, with real processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow import MlflowClient

from ultrathink_model.config import override_config, save_config
from ultrathink_model.tracking import mlflow as tracking
from ultrathink_model.tracking.metrics import MetricsWriter, read_metrics
from ultrathink_model.tracking.mlflow import MlflowRun
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity

pytestmark = pytest.mark.slow

TRACKED_PROCESS = """
import sys, time
from ultrathink_model.config import load_config
from ultrathink_model.tracking import mlflow as tracking
from ultrathink_model.tracking.metrics import MetricsWriter, read_metrics
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity
tracking.POLL_SECONDS = 0.01
config = load_config(sys.argv[1])
folder = RunFolder(config.output.output_dir)
folder.begin(RunIdentity.of(config, "killed"), config)
writer = MetricsWriter(folder.metrics_file)
step = int(max((row["step"] for row in read_metrics(folder.metrics_file)), default=0))
step -= step % 10  # as if the last checkpoint were that old: these steps are done and written again
writer.truncate_after(step)
run = tracking.MlflowRun.start(config, "killed", folder)
while step < int(sys.argv[2]):
    step += 1
    writer.write(step, {"train/loss": 1 / step})
    time.sleep(0.005)
run.finish(wait_seconds=60)
"""


@pytest.fixture
def folder(tiny_config):
    folder = RunFolder(tiny_config.output.output_dir)
    folder.begin(RunIdentity.of(tiny_config, "run"), tiny_config)
    return folder


def write_steps(folder, steps):
    writer = MetricsWriter(folder.metrics_file)
    for step in steps:
        writer.write(step, {"train/loss": 1 / step})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(database, port):
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(database.parent / "art")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = (database.parent / "server.log").open("ab")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    log.close()
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, (database.parent / "server.log").read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
        else:
            return server


def stop_server(server):
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def history(database, run_id):
    points = MlflowClient(f"sqlite:///{database}").get_metric_history(run_id, "train/loss")
    return sorted((point.step, point.value) for point in points)


def test_server_that_goes_down_in_the_middle_gets_every_step_once(tiny_config, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "FIRST_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "LONGEST_RETRY_SECONDS", 1.0)
    database, port = tmp_path / "server.db", free_port()
    config = override_config(
        tiny_config, [f"logging.mlflow_tracking_uri=http://127.0.0.1:{port}", "logging.system_metrics=false"]
    )
    server = start_server(database, port)
    run = MlflowRun.start(config, "run", folder)
    write_steps(folder, range(1, 200))
    deadline = time.monotonic() + 60
    while run.run_id is None or not history(database, run.run_id):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stop_server(server)
    write_steps(folder, range(200, 400))
    time.sleep(2.0)
    server = start_server(database, port)
    write_steps(folder, range(400, 500))
    run.log_artifact(folder.config_file)
    run.finish(wait_seconds=60)
    assert history(database, run.run_id) == [(step, 1 / step) for step in range(1, 500)]
    assert MlflowClient(f"sqlite:///{database}").get_run(run.run_id).info.status == "FINISHED"
    stop_server(server)


@pytest.mark.parametrize("ailment", ["slow", "full"])
def test_store_that_never_answers_or_is_full_neither_stops_nor_ends_a_run(tiny_config, folder, caplog, ailment):
    may_answer = threading.Event()

    class Ailing(BaseHTTPRequestHandler):
        def answer(self):
            if ailment == "slow":
                may_answer.wait(60)
            self.send_error(507, "Insufficient Storage")

        do_GET = do_POST = answer  # noqa: N815 - the library's names

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Ailing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        config = override_config(tiny_config, [f"logging.mlflow_tracking_uri={uri}", "logging.system_metrics=false"])
        run = MlflowRun.start(config, "run", folder)
        write_steps(folder, range(1, 101))
        run.finish(wait_seconds=2)
        assert f"MLflow at {uri} has not taken 100 lines of metrics" in caplog.text
        assert "sent when the run is started again" in caplog.text
        assert len(read_metrics(folder.metrics_file)) == 100
        may_answer.set()
        server.shutdown()


def test_tracked_process_killed_again_and_again_sends_every_step_once(tiny_config, tmp_path):
    database, config_file = tmp_path / "mlflow.db", tmp_path / "config.yaml"
    overrides = [f"logging.mlflow_tracking_uri=sqlite:///{database}", "logging.system_metrics=false"]
    overrides.append(f"logging.mlflow_artifact_dir={tmp_path / 'art'}")
    config = override_config(tiny_config, overrides)
    save_config(config, config_file)
    MlflowClient(config.logging.mlflow_tracking_uri).search_experiments()
    folder = RunFolder(config.output.output_dir)
    runs = set()
    for seconds in (0.1, 0.37, 0.73):
        process = subprocess.Popen([sys.executable, "-c", TRACKED_PROCESS, str(config_file), "100000"])
        before = folder.mlflow_file.read_bytes() if folder.mlflow_file.exists() else b""
        deadline = time.monotonic() + 90
        # Sending begins some seconds after the start, when MLflow is imported.
        while not folder.mlflow_file.exists() or b'"train/loss"' not in folder.mlflow_file.read_bytes().replace(
            before, b""
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.wait()
        runs.add(folder.record().mlflow_run_id)
    steps = int(folder.metrics_file.read_bytes().count(b"\n")) + 50
    subprocess.run([sys.executable, "-c", TRACKED_PROCESS, str(config_file), str(steps)], check=True)
    assert len(runs) == 1
    assert history(database, runs.pop()) == [(step, 1 / step) for step in range(1, steps + 1)]
