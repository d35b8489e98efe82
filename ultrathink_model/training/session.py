"""What surrounds a stage's work on every rank: who decides, how the end is noted, who watches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext, broadcast_object
from ultrathink_model.errors import TrainingStoppedError, UltrathinkError
from ultrathink_model.tracking.mlflow import MlflowRun
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.log_file import log_to_file

# A process that was told to stop may be killed half a minute later.
STOPPED_WAIT_SECONDS = 10.0

Value = TypeVar("Value")


@dataclass(frozen=True)
class StagePlace:
    """Where a stage stands in its pipeline, for those who watch it.

    Attributes:
        number: Number of the stage, from 1.
        of: Stages in the pipeline.
        parent_run_id: MLflow run of the pipeline.
        tags: Tags of the stage's own MLflow run.
    """

    number: int = 1
    of: int = 1
    parent_run_id: str | None = None
    tags: Mapping[str, str] | None = None


ALONE = StagePlace()


def on_main(context: RankContext, work: Callable[[], Value]) -> Value:
    """What `work` returns on rank 0, on every rank; a typed error there is raised on all of them."""
    value: Value | None = None
    error: UltrathinkError | None = None
    if context.is_main:
        try:
            value = work()
        except UltrathinkError as raised:
            error = raised
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return value


@contextmanager
def noted_ending(config: Config, context: RankContext, folder: RunFolder) -> Iterator[None]:
    """Keeps the log of a start in the run's folder, and notes in `run.json` how it ended, unless it finished."""
    if not context.is_main:
        yield
        return
    with log_to_file(folder.log_file, config.logging.log_level):
        try:
            yield
        except TrainingStoppedError:
            folder.set_status("stopped")
            raise
        except BaseException:
            folder.set_status("failed")
            raise


@contextmanager
def mlflow_run(config: Config, folder: RunFolder, run_name: str, place: StagePlace) -> Iterator[None]:
    """An MLflow run that is fed from the folder while it is open, and closed as the block ends."""
    if not config.logging.use_mlflow:
        yield
        return
    run = MlflowRun.start(config, run_name, folder, parent_run_id=place.parent_run_id, tags=place.tags)
    try:
        yield
    except TrainingStoppedError:
        run.finish("KILLED", STOPPED_WAIT_SECONDS)
        raise
    except BaseException:
        run.finish("FAILED", STOPPED_WAIT_SECONDS)
        raise
    else:
        for path in (folder.routing_file, folder.revisions_file, folder.choices_file, folder.preferences_file):
            if path.exists():
                run.log_artifact(path)
        run.finish()
    finally:
        if run.run_id is not None:
            folder.set_mlflow_run_id(run.run_id)
