"""One stage of training, from a config to a run's folder: data, ranks, training or alignment, evaluation, report."""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ultrathink_model.alignment.align import align
from ultrathink_model.alignment.constitutional import constitute
from ultrathink_model.alignment.reward_stage import learn_rewards
from ultrathink_model.config import Config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.distributed.launch import launch
from ultrathink_model.errors import ConfigError
from ultrathink_model.evaluation.evaluate import evaluate_model
from ultrathink_model.evaluation.gates import check_gates
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.evaluation.task_files import check_inputs
from ultrathink_model.models.hf import read_model_config
from ultrathink_model.reporting import write_report
from ultrathink_model.tracking.metrics import MetricsWriter, read_metrics
from ultrathink_model.tracking.mlflow import MlflowRun
from ultrathink_model.tracking.remote_folder import mirrored
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.run import train
from ultrathink_model.training.session import StagePlace

SPEED_PREFIX = "eval/generation/"
UPLOAD_THREAD = "mlflow-upload"
UPLOAD_SECONDS = 120.0


def run_stage(
    config: Config,
    *,
    run_name: str,
    init_from: Path | None = None,
    manifest: DataManifest | None = None,
    place: StagePlace = StagePlace(),  # noqa: B008 - frozen
    evaluate: bool = True,
) -> StageResult:
    """Trains, or aligns under `advanced.enable_rlhf` or `constitutional.enabled`, and leaves the run's folder complete.

    Starts the ranks that `distributed` asks for, unless this process is one of them already. The same call made
    again goes on from the newest checkpoint in the folder.

    Args:
        config: The whole run; `output.output_dir` is its folder.
        run_name: Name of the run; another name in the same folder is another run.
        init_from: A model folder to take the first weights from.
        manifest: Data that are prepared already; None prepares those of the config.
        place: Where the stage stands in its pipeline, for the progress line and MLflow.
        evaluate: Whether to evaluate and to log the model to MLflow at the end, as a run of its own wants it.

    Raises:
        UltrathinkError: The config, the data, `init_from` or a checkpoint cannot be used.
        ConfigError: Another process trains in the same folder.
        TrainingStoppedError: A signal stopped the run after its state was saved.
    """
    check_inputs(config.evaluation)
    if init_from is not None:
        read_model_config(init_from)
    if manifest is None:
        # Every rank asks for it; the first one on a machine prepares it, and the others wait for that one.
        manifest = prepare_data(config)
    folder = RunFolder(config.output.output_dir)
    with _sole_user(folder), mirrored(config) if _is_first_rank() else nullcontext():
        result: StageResult = launch(_train_on_rank, (config, manifest, init_from, run_name, place), config)
        if not _is_first_rank():
            return result
        # A reward model predicts no text.
        if evaluate and not config.rlhf.only_reward_model:
            evaluate_stage(config, manifest, run_name, [folder.final_model])
        else:
            write_report([folder.path], folder.report_file, run_name)
    return result


def evaluate_stage(
    config: Config, manifest: DataManifest, run_name: str, artifacts: Sequence[Path] = ()
) -> EvaluationResult:
    """Evaluates the model of a finished run and adds what it found to the run: its files, its report, MLflow.

    Args:
        config: The run.
        manifest: Its prepared data.
        run_name: Its name.
        artifacts: More files or folders that MLflow is to have.

    Raises:
        CheckpointError: The run's folder holds no model.
        TokenizerError: The data were prepared with another tokenizer than the model's.
        GateError: The model does not keep `evaluation.gates`; all that was found is written all the same.
    """
    folder = RunFolder(config.output.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = evaluate_model(folder.final_model, manifest, config, folder.path, device)
    _note_metrics(folder, result)
    write_report([folder.path], folder.report_file, run_name)
    _upload(config, folder, run_name, [folder.evaluation_file, folder.report_file, *artifacts])
    measured: dict[str, float] = {}
    for row in read_metrics(folder.metrics_file):
        measured |= row
    check_gates(config.evaluation.gates, measured | result.metrics, run_name)
    return result


def describe_results(config: Config) -> None:
    """Prints where a run's results are, on the first rank."""
    if not _is_first_rank():
        return
    folder = RunFolder(config.output.output_dir)
    rows = {"report": folder.report_file, "model": folder.final_model, "metrics": folder.metrics_file}
    print(f"Done: {folder.path}")
    for name, path in rows.items():
        print(f"  {name:8}{path.resolve()}")
    if config.logging.use_mlflow:
        program = Path(sys.executable).parent / "mlflow"
        print(f"  {'MLflow':8}{program} ui --backend-store-uri {config.logging.mlflow_tracking_uri}")


@contextmanager
def _sole_user(folder: RunFolder) -> Iterator[None]:
    """Keeps other processes out of a run's folder; the system lets go of it however this one ends."""
    if not _is_first_rank():
        yield
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"output.output_dir={folder.path}: another process trains there; wait for it, or name another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train_on_rank(
    config: Config, manifest: DataManifest, init_from: Path | None, run_name: str, place: StagePlace
) -> StageResult:
    """What every rank does."""
    if config.constitutional.enabled:
        run = constitute
    elif config.advanced.enable_rlhf:
        run = learn_rewards if config.rlhf.only_reward_model else align
    else:
        run = train
    return run(config, manifest=manifest, init_from=init_from, run_name=run_name, place=place)


def _note_metrics(folder: RunFolder, result: EvaluationResult) -> None:
    """Adds the evaluation to `metrics.jsonl`, on the run's last step, unless it stands there already."""
    rows = read_metrics(folder.metrics_file)
    # How fast it is is another figure each time.
    lasting = {name: value for name, value in result.metrics.items() if not name.startswith(SPEED_PREFIX)}
    if rows and lasting.items() <= rows[-1].items():
        return
    last = rows[-1] if rows else {"step": 0}
    values = {"tokens": last["tokens"], **result.metrics} if "tokens" in last else result.metrics
    MetricsWriter(folder.metrics_file).write(int(last["step"]), values)


def _upload(config: Config, folder: RunFolder, run_name: str, paths: list[Path]) -> None:
    """Brings the run in MLflow up to date with its folder, and adds these files."""
    if not config.logging.use_mlflow:
        return
    # Training may have left its uploader at work on a slow store; two at once would send things twice.
    for thread in threading.enumerate():
        if thread.name == UPLOAD_THREAD:
            thread.join(UPLOAD_SECONDS)
    tracked = MlflowRun.start(config, run_name, folder)
    for path in paths:
        tracked.log_artifact(path)
    tracked.finish(wait_seconds=UPLOAD_SECONDS)
