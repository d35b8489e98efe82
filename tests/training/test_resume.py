import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Rows, losses
from gloo_ranks import run_ranks

from ultrathink_model.config import Config, override_config, save_config
from ultrathink_model.data import DataManifest
from ultrathink_model.errors import CheckpointError, TrainingStoppedError
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.checkpoint import verify_checkpoint
from ultrathink_model.training.run import train

# Every kind of state at once: two optimizers, a schedule, routing buffers, and draws in each forward pass.
EVERYTHING = (
    "training.max_steps=16",
    "training.checkpoint_steps=4",
    "training.optimizer=muon",
    "training.gradient_accumulation_steps=2",
    "training.batch_size=2",
    "data.train_samples=20",
    "training.num_epochs=9",
    "advanced.enable_moe=true",
    "moe.router_jitter=0.1",
    "advanced.enable_dre=true",
    "advanced.dre_warmup_steps=8",
)


def start(folder: Path, config: Config, manifest: DataManifest) -> subprocess.Popen[str]:
    """A real process that trains `config` into `folder`."""
    path = folder.with_suffix(".yaml")
    save_config(override_config(config, [f"output.output_dir={folder}"]), path)
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("train_process.py")),
        str(path),
        str(manifest.path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def by_step(rows: Rows) -> dict[float, dict[str, float]]:
    """All figures of each step: a resumed run adds a line for what a signal kept the one before from measuring."""
    merged: dict[float, dict[str, float]] = {}
    for row in rows:
        merged[row["step"]] = merged.get(row["step"], {}) | row
    return merged


def assert_same_run(folder: Path, reference: Path, rows: Rows) -> None:
    """Bitwise the same losses at the same steps, and bitwise the same model."""
    found, expected = by_step(read_metrics(folder / "metrics.jsonl")), by_step(rows)
    assert list(found) == list(expected)
    for key in ("tokens", "train/loss", "train/grad_norm", "val/loss", "train/aux/moe/load_balance"):
        assert [row.get(key) for row in found.values()] == [row.get(key) for row in expected.values()], key
    weights = "final_model/model.safetensors"
    assert (folder / weights).read_bytes() == (reference / weights).read_bytes()


@pytest.fixture(scope="module")
def reference(base_config, manifest, tmp_path_factory) -> tuple[Path, Rows]:
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    config = override_config(base_config, [*EVERYTHING, f"output.output_dir={folder}"])
    train(config, manifest=manifest, run_name="tiny")
    return folder, read_metrics(folder / "metrics.jsonl")


def test_resumed_losses_equal_uninterrupted_losses(base_config, manifest, tmp_path, reference):
    check_killed(base_config, manifest, tmp_path, reference, [6], random.Random(0))


def check_killed(
    config: Config,
    manifest: DataManifest,
    tmp_path: Path,
    reference: tuple[Path, Rows],
    steps: list[int],
    draw: random.Random,
) -> None:
    config = override_config(config, EVERYTHING)
    folder = tmp_path / "killed"
    for step in steps:
        process = start(folder, config, manifest)
        wait_for_step(process, folder, step)
        time.sleep(draw.random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    process = start(folder, config, manifest)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["steps"] == 16
    assert_same_run(folder, *reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_exits_75_and_the_next_start_goes_on(base_config, manifest, tmp_path, reference, number):
    config = override_config(base_config, EVERYTHING)
    folder = tmp_path / "stopped"
    process = start(folder, config, manifest)
    wait_for_step(process, folder, 5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"stopped by {number.name} after step" in errors
    assert "start the same command again" in errors
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    last = sorted(folder.glob("checkpoint_*.pt"))[-1]
    step = verify_checkpoint(last).position.step
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == step
    assert f"after step {step} of 16" in errors
    process = start(folder, config, manifest)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same_run(folder, *reference)


def test_a_damaged_checkpoint_is_named_in_the_log_and_the_one_before_is_used(train_tiny, tmp_path, base_config):
    train_tiny("training.checkpoint_steps=2", "training.keep_checkpoints=3")
    run = tmp_path / "run"
    rows = read_metrics(run / "metrics.jsonl")
    bad = run / "checkpoint_00000006.pt"
    shard = next(bad.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-7])
    shutil.rmtree(run / "final_model")
    _, again = train_tiny("training.checkpoint_steps=2", "training.keep_checkpoints=3")
    log = (run / "training.log").read_text()
    assert f"damaged checkpoint passed over: {shard}" in log
    assert "goes on after step 4" in log
    assert losses(again) == losses(rows)
    verify_checkpoint(bad)


def test_a_finished_run_started_again_returns_its_result_at_once(train_tiny, tmp_path):
    first, _ = train_tiny()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    second, _ = train_tiny()
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_never_starts_anew_and_keeps_the_old_run_aside(train_tiny, tmp_path):
    _, first = train_tiny("training.max_steps=4")
    _, second = train_tiny("training.max_steps=4", "training.resume=never")
    assert losses(second) == losses(first)
    assert (tmp_path / "run" / "previous" / "tiny" / "checkpoint_00000004.pt" / "manifest.json").is_file()
    assert "goes on" not in (tmp_path / "run" / "training.log").read_text()


def test_a_changed_config_in_the_same_folder_is_shown_and_begins_anew(train_tiny, tmp_path):
    train_tiny("training.max_steps=2")
    _, rows = train_tiny("training.max_steps=3", "training.learning_rate=2.0e-2", "logging.log_steps=2")
    assert rows[-1]["step"] == 3
    log = (tmp_path / "run" / "training.log").read_text()
    assert "held a run that differs from this one, which begins anew" in log
    assert "training.learning_rate: 0.01 → 0.02; training.max_steps: 2 → 3. To go on" in log
    assert (tmp_path / "run" / "previous" / "tiny" / "checkpoint_00000002.pt").is_dir()


def test_a_path_goes_on_from_that_checkpoint_with_another_rate(train_tiny, tmp_path):
    train_tiny("training.checkpoint_steps=2", "training.keep_checkpoints=9", "training.schedule=constant")
    path = tmp_path / "run" / "checkpoint_00000004.pt"
    # Another run in the same folder: the checkpoint is moved away with the run that wrote it, and found there.
    result, rows = train_tiny(f"training.resume={path}", "training.learning_rate=2.0e-2", "training.schedule=constant")
    assert result.steps == 6
    assert [row["step"] for row in rows] == [5, 6]
    assert rows[0]["train/learning_rate"] == pytest.approx(2e-2)
    log = (tmp_path / "run" / "training.log").read_text()
    assert "training.learning_rate: 0.01 → 0.02" in log


def test_a_path_within_the_same_run_drops_what_came_after_it(train_tiny, tmp_path):
    settings = ("training.checkpoint_steps=2", "training.keep_checkpoints=9")
    _, rows = train_tiny(*settings)
    path = tmp_path / "run" / "checkpoint_00000002.pt"
    _, again = train_tiny(*settings, f"training.resume={path}")
    assert losses(again) == losses(rows)
    assert [row["step"] for row in again] == [row["step"] for row in rows]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_size=16", "model.hidden_size: 32 → 16"),
        ("model.rope_theta=500.0", "model.rope_theta: 10000.0 → 500.0"),
        ("advanced.enable_moe=true", "advanced.enable_moe: False → True"),
        ("training.optimizer=muon", "training.optimizer: adamw → muon"),
        ("training.batch_size=8", "global batch in sequences: 4 → 8"),
    ],
)
def test_what_cannot_be_resumed_across_is_refused_with_the_difference(train_tiny, tmp_path, override, named):
    train_tiny("training.max_steps=2")
    path = tmp_path / "run" / "checkpoint_00000002.pt"
    with pytest.raises(CheckpointError, match=f"cannot be resumed.*{named}.*training.resume=never"):
        train_tiny(f"training.resume={path}", override, folder="other")
    assert not (tmp_path / "other").exists()


def test_other_data_and_another_tokenizer_are_refused(train_tiny, base_config, manifest, tmp_path):
    train_tiny("training.max_steps=2")
    path = tmp_path / "run" / "checkpoint_00000002.pt"
    other = manifest.model_copy(update={"fingerprint": "ff", "tokenizer_hash": "ee"})
    config = override_config(base_config, [f"training.resume={path}", f"output.output_dir={tmp_path / 'other'}"])
    with pytest.raises(CheckpointError, match=r"tokenizer: .* → ee; data: .* → ff"):
        train(config, manifest=other, run_name="tiny")


def test_other_data_are_gone_on_with_where_allow_changed_says_so(train_tiny, base_config, manifest, tmp_path, caplog):
    train_tiny("training.max_steps=2")
    path = tmp_path / "run" / "checkpoint_00000002.pt"
    other = manifest.model_copy(update={"fingerprint": "ff"})
    settings = [f"training.resume={path}", f"output.output_dir={tmp_path / 'other'}", "training.max_steps=3"]
    config = override_config(base_config, [*settings, "data.allow_changed=true"])
    assert train(config, manifest=other, run_name="tiny").steps == 3
    assert "goes on with other data" in caplog.text


def test_a_run_cut_short_is_refused_when_its_data_have_changed(train_tiny, base_config, manifest, tmp_path):
    train_tiny("training.max_steps=2")
    run = RunFolder(tmp_path / "run")
    run.set_status("stopped")
    other = manifest.model_copy(update={"fingerprint": "ff"})
    config = override_config(base_config, ["training.max_steps=2", f"output.output_dir={run.path}"])
    with pytest.raises(CheckpointError, match=r"data have changed since: .* → ff.*data\.allow_changed=true"):
        train(config, manifest=other, run_name="tiny")
    assert run.checkpoint(2).is_dir()
    allowed = override_config(config, ["data.allow_changed=true"])
    assert train(allowed, manifest=other, run_name="tiny").steps == 2
    assert not (run.path / "previous").exists()


def test_other_data_under_the_same_config_begin_another_run(train_tiny, base_config, manifest, tmp_path):
    train_tiny("training.max_steps=2")
    config = override_config(base_config, ["training.max_steps=2", f"output.output_dir={tmp_path / 'run'}"])
    train(config, manifest=manifest.model_copy(update={"fingerprint": "ff"}), run_name="tiny")
    assert (tmp_path / "run" / "previous" / "tiny" / "metrics.jsonl").is_file()


def test_a_run_from_another_model_at_the_same_path_is_another_run(train_tiny, tmp_path):
    first, _ = train_tiny(folder="first")
    one, _ = train_tiny(folder="second", init_from=Path(first.final_model))
    train_tiny("training.seed=7", folder="first")
    two, _ = train_tiny(folder="second", init_from=Path(first.final_model))
    assert two.metrics["val/loss"] != one.metrics["val/loss"]


def test_a_run_that_replaces_the_model_it_started_from_is_finished_all_the_same(train_tiny):
    first, _ = train_tiny("training.max_steps=2", run_name="baseline")
    second, rows = train_tiny("training.max_steps=3", run_name="advanced", init_from=Path(first.final_model))
    assert second.final_model == first.final_model
    assert rows[0]["val/loss"] == pytest.approx(first.metrics["val/loss"], abs=1e-5)
    again, _ = train_tiny("training.max_steps=3", run_name="advanced", init_from=Path(first.final_model))
    assert again == second


@pytest.mark.parametrize("name", ["nothing", "checkpoint_00000009.pt"])
def test_a_path_without_a_checkpoint_is_refused(train_tiny, tmp_path, name):
    with pytest.raises(CheckpointError, match=f"training.resume=.*{name}"):
        train_tiny(f"training.resume={tmp_path / name}")


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("ddp", "adamw"),
        pytest.param("ddp", "muon", marks=pytest.mark.slow),
        pytest.param("fsdp", "adamw", marks=pytest.mark.slow),
        pytest.param("fsdp", "muon", marks=pytest.mark.slow),
        pytest.param("deepspeed", "adamw", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
    ],
)
def test_a_run_continues_over_another_number_of_ranks(train_tiny, base_config, manifest, tmp_path, strategy, optimizer):
    settings = [
        f"training.optimizer={optimizer}",
        "training.max_steps=6",
        "training.checkpoint_steps=3",
        "training.global_batch_size=8",
        "training.keep_checkpoints=9",
        "training.batch_size=2",
    ]
    _, rows = train_tiny(*settings, folder="one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("checkpoint_00000006.pt", "final_model"):
        shutil.rmtree(tmp_path / "two" / name)
    two_ranks = [
        *settings,
        "distributed.enabled=true",
        f"distributed.strategy={strategy}",
        f"output.output_dir={tmp_path / 'two'}",
    ]
    run_ranks(2, _train_rank, override_config(base_config, two_ranks), manifest)
    again = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    assert losses(again) == pytest.approx(losses(rows), abs=1e-6)
    assert "goes on after step 3" in (tmp_path / "two" / "training.log").read_text()


def _train_rank(rank: int, config: Config, manifest: DataManifest) -> None:
    result = train(config, manifest=manifest, run_name="tiny")
    assert result.steps == 6


@pytest.mark.slow
def test_signal_to_one_rank_stops_and_saves_on_all(base_config, manifest, tmp_path):
    overrides = ["training.max_steps=500", "distributed.enabled=true", f"output.output_dir={tmp_path / 'run'}"]
    run_ranks(2, _train_until_signalled, override_config(base_config, overrides), manifest)
    checkpoint = sorted((tmp_path / "run").glob("checkpoint_*.pt"))[-1]
    assert verify_checkpoint(checkpoint).world_size == 2


def _train_until_signalled(rank: int, config: Config, manifest: DataManifest) -> None:
    if rank == 1:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 3)
    with pytest.raises(TrainingStoppedError, match="SIGTERM" if rank == 1 else "a signal to another rank"):
        train(config, manifest=manifest, run_name="tiny")
