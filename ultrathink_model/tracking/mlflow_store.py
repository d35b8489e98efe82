"""The calls that we make on MLflow's store, and what of a config it is shown."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ultrathink_model.config import Config, dump_config
from ultrathink_model.config.training import LoggingConfig
from ultrathink_model.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What MLflow takes in one request.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SQLITE = "sqlite:///"
CREDENTIALS = re.compile(r"://[^/@\s]+@")
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_key|credentials?)$")


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    time: float
    step: int


class MlflowStore:
    """One experiment of an MLflow store; each method is one exchange with it, and raises what MLflow raises.

    Creating it is free: MLflow is imported, which takes seconds, at the first call.
    """

    def __init__(self, config: LoggingConfig) -> None:
        self._config = config
        self._uri = _anchored(config.mlflow_tracking_uri)
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self.safe_uri = CREDENTIALS.sub("://***@", config.mlflow_tracking_uri)

    @property
    def client(self) -> "MlflowClient":
        """MLflow's own client, made at the first use."""
        if self._client is None:
            # Nothing is sent to anybody but the store that the config names. The client's own retries are cut
            # from four minutes to seconds: the upload thread has its own, and must notice when the run ends.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
            from mlflow import MlflowClient  # noqa: PLC0415 - seconds long, and not needed by every run

            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
            self._client = MlflowClient(tracking_uri=self._uri)
        return self._client

    def experiment_id(self) -> str:
        """The experiment's id; it is made, with its artifact root, where there is none."""
        if self._experiment_id is None:
            name = self._config.experiment_name
            found = self.client.get_experiment_by_name(name)
            self._experiment_id = (
                found.experiment_id if found else self.client.create_experiment(name, self._artifact_root())
            )
        return self._experiment_id

    def create_run(self, name: str, tags: Mapping[str, str]) -> str:
        """Makes a run and returns its id."""
        return self.client.create_run(self.experiment_id(), tags=dict(tags), run_name=name).info.run_id

    def find_run(self, tag: str, value: str) -> str | None:
        """The run of the experiment that has a tag of this value."""
        found = self.client.search_runs([self.experiment_id()], f"tags.`{tag}` = '{value}'", max_results=1)
        return found[0].info.run_id if found else None

    def has_run(self, run_id: str) -> bool:
        """Whether the store has this run, not deleted."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415 - see `client`

        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def resume_run(self, run_id: str) -> None:
        """Shows a run as running again."""
        self.client.update_run(run_id, status="RUNNING")

    def end_run(self, run_id: str, status: str) -> None:
        """Shows a run as ended."""
        self.client.set_terminated(run_id, status)

    def send_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Sends the params that the run does not have yet; those that it has cannot change."""
        from mlflow.entities import Param  # noqa: PLC0415 - see `client`

        known = self.client.get_run(run_id).data.params
        new = [Param(name, value) for name, value in params.items() if name not in known]
        for start in range(0, len(new), PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=new[start : start + PARAMS_PER_BATCH], synchronous=True)

    def send_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Sends up to `METRICS_PER_BATCH` points."""
        from mlflow.entities import Metric  # noqa: PLC0415 - see `client`

        metrics = [Metric(_metric_name(p.name), float(p.value), round(1000 * p.time), p.step) for p in points]
        self.client.log_batch(run_id, metrics=metrics, synchronous=True)

    def last_step(self, run_id: str, metric: str) -> int:
        """The last step that the store has of a metric, -1 where it has none."""
        return max((point.step for point in self.client.get_metric_history(run_id, _metric_name(metric))), default=-1)

    def send_text(self, run_id: str, text: str, name: str) -> None:
        """Sends a text as an artifact."""
        self.client.log_text(run_id, text, name)

    def send_artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Sends a file, or a folder under its own name."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), "/".join(part for part in (folder, path.name) if part))
        else:
            self.client.log_artifact(run_id, str(path), folder or None)

    def _artifact_root(self) -> str | None:
        """Folder of the experiment's artifacts for a database store; a server chooses its own."""
        if not self._config.mlflow_tracking_uri.startswith(DATABASES):
            return None
        folder = re.sub(r"[^\w.-]+", "_", self._config.experiment_name)
        root = self._config.mlflow_artifact_dir
        return f"{root}/{folder}" if "://" in root else (Path(root).resolve() / folder).as_uri()


def _anchored(uri: str) -> str:
    """The address with a SQLite file's path made whole.

    For one address MLflow keeps the same connections as long as the process lives, also once that is in another folder.
    """
    path = uri.removeprefix(SQLITE)
    if path == uri or path in ("", ":memory:") or path.startswith("file:"):
        return uri
    return SQLITE + str(Path(path).absolute())


def attempt(action: Callable[[], Any]) -> Exception | None:
    """Runs an exchange with MLflow and returns the error that it ended in.

    The one broad `except` of tracking. MLflow's stores raise what their database driver, HTTP library or cloud SDK
    raises, with no common class; whatever it is, tracking tries again and training goes on. Some of them name the store's
    address in full: what is returned here holds no credentials.
    """
    try:
        action()
    except Exception as error:  # noqa: BLE001 - see above
        text = CREDENTIALS.sub("://***@", str(error))
        return error if text == str(error) else ConnectionError(text)
    return None


def check_tracking_uri(uri: str) -> None:
    """Refuses a file store, which MLflow 3 refuses too, before a run begins.

    Raises:
        ConfigError: The URI names a folder.
    """
    is_folder = uri.startswith("file:") or "://" not in uri
    if is_folder and uri != "databricks" and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() != "true":
        raise ConfigError(
            f"logging.mlflow_tracking_uri={uri} names a folder, a kind of store that MLflow has given up; "
            "take sqlite:///mlflow.db or the address of a server"
        )


def config_params(config: Config) -> dict[str, str]:
    """Every `section.key` of the config with its value as text, secrets blotted out."""
    return {
        f"{section}.{key}": "***" if SECRET_KEY.search(key) and value else CREDENTIALS.sub("://***@", str(value))
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }


def redacted_config(config: Config) -> str:
    """The resolved config as YAML, without the credentials that an address may hold."""
    return CREDENTIALS.sub("://***@", dump_config(config))


def _metric_name(name: str) -> str:
    """The name with what MLflow does not take in one replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name)
