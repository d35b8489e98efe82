"""When a cached result may stand for a step: same inputs, same code, and a result that is still there.

ZenML's own cache key holds a step's parameters, its inputs' contents and the code of the step function. The policies
here add the code of the package behind the step. `expire_stale_results` takes out results whose files have gone or
changed: ZenML keeps only our reference to them and would serve it for ever.
"""

import hashlib
import logging
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

from pydantic import ValidationError
from zenml.client import Client
from zenml.config.cache_policy import CachePolicy
from zenml.enums import ExecutionStatus
from zenml.exceptions import DoesNotExistException
from zenml.models import ArtifactVersionResponse, StepRunResponse
from zenml.utils.pagination_utils import depaginate
from zenml.utils.time_utils import utc_now

import ultrathink_model
from steps.references import Reference

PACKAGE = Path(ultrathink_model.__file__).parent

DATA_CODE = ("errors.py", "config", "data")
MODEL_CODE = (*DATA_CODE, "models", "distributed")
TRAINING_CODE = (*MODEL_CODE, "evaluation", "tracking", "training", "stage.py")

logger = logging.getLogger(__name__)


def hash_code(names: Iterable[str]) -> str:
    """SHA-256 over the files of parts of the package, whatever their kind."""
    digest = hashlib.sha256()
    for name in names:
        path = PACKAGE / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(PACKAGE).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def data_code() -> str:
    """Hash of the code that prepares data."""
    return hash_code(DATA_CODE)


def training_code() -> str:
    """Hash of the code that pretrains."""
    return hash_code(TRAINING_CODE)


def alignment_code() -> str:
    """Hash of the code that aligns."""
    return hash_code((*TRAINING_CODE, "alignment"))


def evaluation_code() -> str:
    """Hash of the code that evaluates and writes a stage's report."""
    return hash_code((*MODEL_CODE, "evaluation", "tracking", "promotion", "reporting", "stage.py"))


def export_code() -> str:
    """Hash of the code that exports."""
    return hash_code((*MODEL_CODE, "planning", "evaluation", "tracking", "training", "alignment", "export"))


def report_code() -> str:
    """Hash of the code that writes the report."""
    return hash_code((*MODEL_CODE, "evaluation", "tracking", "promotion", "reporting"))


def promotion_code() -> str:
    """Hash of the code that puts a model into production."""
    return hash_code(("errors.py", "config", "tracking", "promotion"))


PREPARE_DATA = CachePolicy(cache_func=data_code)
TRAIN = CachePolicy(cache_func=training_code)
ALIGN = CachePolicy(cache_func=alignment_code)
EVALUATE = CachePolicy(cache_func=evaluation_code)
EXPORT = CachePolicy(cache_func=export_code)
REPORT = CachePolicy(cache_func=report_code)
PROMOTE = CachePolicy(cache_func=promotion_code)


def expire_stale_results(folder: str, step_names: Iterable[str]) -> None:
    """Makes ZenML forget cached results of a workflow's steps that are gone from its folder, or changed there.

    Args:
        folder: The workflow's folder; results of other folders are never served for it.
        step_names: Names of the steps.
    """
    client = Client()
    for name in step_names:
        for run in _cached_runs(client, name):
            if run.config.parameters.get("plan", {}).get("folder") != folder:
                continue
            if not all(_is_intact(output) for outputs in run.outputs.values() for output in outputs):
                logger.warning("stage %s: its earlier result is gone from the disk or changed, and not used.", name)
                client.update_step_run(run.id, cache_expires_at=utc_now() - timedelta(seconds=1))


def _cached_runs(client: Client, step_name: str) -> list[StepRunResponse]:
    """The runs of a step that ZenML may serve a result of."""
    return depaginate(
        client.list_run_steps, name=step_name, status=ExecutionStatus.COMPLETED, cache_expired=False, hydrate=True
    )


def _is_intact(output: ArtifactVersionResponse) -> bool:
    """Whether an output is no reference, or one that still holds; one that cannot be read does not."""
    if output.data_type.module != Reference.__module__:
        return True
    try:
        reference = output.load()
    except (OSError, ModuleNotFoundError, DoesNotExistException, ValidationError):
        return False
    return isinstance(reference, Reference) and reference.is_intact()
