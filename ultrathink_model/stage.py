"""One stage of training, from a config to a run's folder: data, ranks, training or alignment, evaluation, report."""

import logging
import os
from pathlib import Path

from ultrathink_model.alignment.align import align
from ultrathink_model.config import Config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.distributed.context import shutdown
from ultrathink_model.distributed.launch import launch
from ultrathink_model.evaluation.evaluate import evaluate_model
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.models.hf import read_model_config
from ultrathink_model.reporting import write_report
from ultrathink_model.tracking.metrics import MetricsWriter, read_metrics
from ultrathink_model.tracking.mlflow import MlflowRun
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.run import train

logger = logging.getLogger(__name__)


def run_stage(
    config: Config,
    *,
    run_name: str,
    init_from: Path | None = None,
    manifest: DataManifest | None = None,
    parent_run_id: str | None = None,
    stage: int = 1,
    stages: int = 1,
    evaluate: bool = True,
) -> StageResult:
    """Trains, or aligns under `advanced.enable_rlhf`, and leaves the run's folder complete.

    Starts the ranks that `distributed` asks for, unless this process is one of them already. The same call made
    again goes on from the newest checkpoint in the folder.

    Args:
        config: The whole run; `output.output_dir` is its folder.
        run_name: Name of the run; another name in the same folder is another run.
        init_from: A model folder to take the first weights from.
        manifest: Data that are prepared already; None prepares those of the config.
        parent_run_id: MLflow run that this one is shown under.
        stage: Number of the stage in a longer job, for the progress line.
        stages: How many there are.
        evaluate: Whether to evaluate and to log the model to MLflow at the end, as a run of its own wants it.

    Raises:
        UltrathinkError: The config, the data, `init_from` or a checkpoint cannot be used.
        TrainingStoppedError: A signal stopped the run after its state was saved.
    """
    if init_from is not None:
        read_model_config(init_from)
    if manifest is None:
        # Every rank asks for it; the first one on a machine prepares it, and the others wait for that one.
        manifest = prepare_data(config)
    task = (config, manifest, init_from, run_name, parent_run_id, stage, stages)
    result: StageResult = launch(_train_on_rank, task, config)
    if os.environ.get("RANK", "0") != "0":
        return result
    folder = RunFolder(config.output.output_dir)
    if evaluate:
        evaluate_stage(config, manifest, run_name)
        _log_model(config, folder, run_name)
    else:
        write_report([folder.path], folder.report_file, run_name)
    return result
