"""Workflows as commands: run.py and `zenml pipeline run`, their errors, and what a kill leaves to do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import run
from pipelines import status_command
from ultrathink_model.command_line import run_and_exit

ROOT = Path(run.__file__).resolve().parent

pytestmark = [
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]


@pytest.fixture
def call(workspace, monkeypatch, capfd):
    """Runs run.py in this process: its exit code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def call_run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_and_exit(run.main)
        output = capfd.readouterr()
        return caught.value.code, output.out, output.err

    yield call_run
    signal.signal(signal.SIGTERM, before)


def start(*arguments):
    command = [sys.executable, str(ROOT / "run.py"), "--config", "small.yaml", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, bufsize=1
    )


def read_until(process, text):
    """The lines of a process up to the one that holds `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines) + process.stderr.read())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workflow", "prod"], "invalid choice: 'prod'"),
        (["--workflow", "production", "--config", "nowhere.yaml"], "No such file"),
        (["--workflow", "production", "--profile", "tiny", "--override", "model.hiden_size=3"], "model.hidden_size"),
        (
            ["--workflow", "production", "--config", "small.yaml", "--override", "sft:a.b=1"],
            "baseline, advanced, constitutional, reward, rlhf",
        ),
        (["--workflow", "multi_gpu", "--config", "small.yaml", "--stack", "moon"], "--stack moon is not registered"),
        (["--workflow", "multi_gpu", "--config", "small.yaml", "--override", "data.dataset=empty.txt"], "empty.txt"),
    ],
)
def test_a_mistake_ends_with_its_message_and_exit_code_2(arguments, message, call, workspace):
    (workspace / "empty.txt").write_bytes(b"")
    code, out, error = call(*arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in out + error
    assert not list(workspace.glob("outputs/small/*/*/final_model"))


@pytest.mark.slow
def test_multi_gpu_trains_over_two_ranks_and_says_where_things_are(call, workspace):
    code, out, error = call("--workflow", "multi_gpu", "--config", "small.yaml")
    assert code == 0, error
    folder = workspace / "outputs" / "small" / "multi_gpu"
    assert f"{folder / 'report.html'}" in out
    manifest = json.loads(next((folder / "pretrain").glob("checkpoint_*.pt/manifest.json")).read_text(encoding="utf-8"))
    assert manifest["world_size"] == 2
    assert (folder / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_production_runs_by_its_bare_name(workspace):
    """`zenml pipeline run production_pipeline` from the project's root, with its config from a YAML file."""
    output = workspace / "outputs" / "bare"
    overrides = [
        f"output.output_dir={output}",
        f"data.dataset={workspace / 'corpus.jsonl'}",
        "logging.use_mlflow=false",
    ]
    parameters = {"parameters": {"config": str(workspace / "small.yaml"), "overrides": overrides}}
    (workspace / "parameters.yaml").write_text(json.dumps(parameters), encoding="utf-8")
    zenml = Path(sys.executable).parent / "zenml"
    done = subprocess.run(
        [str(zenml), "pipeline", "run", "production_pipeline", "-c", str(workspace / "parameters.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = {
        stage: json.loads((output / "production" / stage / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
        for stage in ("baseline", "advanced", "rlhf")
    }
    first_line = (output / "production" / "advanced" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first_line)["val/loss"] == pytest.approx(metrics["baseline"]["eval/validation/loss"], abs=0.02)
    assert metrics["advanced"]["eval/validation/loss"] < metrics["baseline"]["eval/validation/loss"]


@pytest.mark.slow
def test_a_mistake_under_zenml_ends_with_its_message_and_exit_code_2(workspace):
    (workspace / "wrong.yaml").write_text('{"parameters": {"profile": "huge"}}', encoding="utf-8")
    zenml = Path(sys.executable).parent / "zenml"
    done = subprocess.run(
        [str(zenml), "pipeline", "run", "prototype_pipeline", "-c", str(workspace / "wrong.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--profile huge does not exist" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9")
def test_after_kill_9_status_closes_the_run_and_the_same_command_finishes_the_work(workspace, capsys):
    from zenml.client import Client

    arguments = ("--workflow", "production", "--override", "advanced:training.num_epochs=10", "--output-dir", "killed")
    with start(*arguments) as killed:
        read_until(killed, "advanced: step 10/")
        os.killpg(killed.pid, signal.SIGKILL)
    (left,) = Client().list_pipeline_runs(pipeline_name="production_pipeline", status="running").items
    status_command.main(["--last", "1"])
    out = capsys.readouterr().out
    assert f"{left.name}: failed" in out
    assert "was cut off by a kill" in out
    assert f"python run.py rerun {left.name}" in out

    again = start(*arguments)
    out, error = again.communicate(timeout=600)
    assert again.returncode == 0, out + error
    for name in ("prepare_data", "baseline"):
        assert f"Using cached version of step `{name}`" in out
    assert "goes on after step" in out
    assert "advanced: step 60/60" in out
    assert "advanced: step 2/" not in out
    rows = (workspace / "killed" / "production" / "advanced" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(row)["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, 61))
    assert not Client().list_pipeline_runs(pipeline_name="production_pipeline", status="running").items


@pytest.mark.slow
def test_sigterm_ends_with_75_and_the_same_command_goes_on(workspace):
    arguments = ("--workflow", "multi_gpu", "--override", "training.num_epochs=30", "--output-dir", "stopped")
    with start(*arguments) as stopped:
        read_until(stopped, "pretrain: step 10/")
        stopped.send_signal(signal.SIGTERM)
        out, error = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, out + error
    assert "start the same command again" in error
    assert "Traceback" not in out + error
    again = start(*arguments)
    out, error = again.communicate(timeout=600)
    assert again.returncode == 0, out + error
    log = workspace / "stopped" / "multi_gpu" / "pretrain" / "training.log"
    assert "goes on after step" in log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_starts_in_one_folder_do_not_mix(workspace, capsys):
    long = ("check:training.max_steps=100000", "check:training.num_epochs=1000", "check:training.checkpoint_steps=null")
    arguments = ("--workflow", "prototype", "--output-dir", "shared", "--override", *long)
    with start(*arguments) as first:
        read_until(first, "check: step")
        second = start(*arguments)
        _, error = second.communicate(timeout=200)
        status_command.main(["--last", "1"])
        os.killpg(first.pid, signal.SIGKILL)
    assert second.returncode == 2
    assert ": running" in capsys.readouterr().out
    assert "another process runs prototype" in error
