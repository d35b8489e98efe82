"""MLflow's model registry: which version is in production, how one gets there, and the way back."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict

from ultrathink_model.config import Config
from ultrathink_model.errors import RegistryError
from ultrathink_model.promotion.lineage import PREFIX
from ultrathink_model.tracking.mlflow_store import MlflowStore, attempt

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ALIAS = "production"
# Versions that were in production before, the newest last, as a tag of the registered model.
HISTORY_TAG = f"{PREFIX}production_history"
METRICS_TAG = f"{PREFIX}metrics"
# What MLflow's own tables hold in such a tag is 5,000 characters.
LONGEST_HISTORY = 500

Answer = TypeVar("Answer")


class Version(BaseModel):
    """One version of the registered model, with the metrics that it was registered with."""

    model_config = ConfigDict(frozen=True)

    number: int
    source: str
    run_id: str | None
    tags: dict[str, str]

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured of it."""
        found: dict[str, float] = json.loads(self.tags.get(METRICS_TAG, "{}"))
        return found


class ModelRegistry:
    """The versions of one registered model. Every method raises `RegistryError` where MLflow cannot do as asked."""

    def __init__(self, config: Config) -> None:
        """Names the model; nothing is asked of MLflow before the first call.

        Args:
            config: `logging` names the store, `promotion.registered_model` the model.
        """
        self._store = MlflowStore(config.logging)
        self.name = config.promotion.registered_model

    def production(self) -> Version | None:
        """The version in production; None where there is none."""
        return self._ask(self._production)

    def version(self, number: int) -> Version:
        """One version by its number."""
        return self._ask(lambda: self._read(self._store.client.get_model_version(self.name, str(number))))

    def register(self, run_id: str, model: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> Version:
        """The version of a model, made where there is none with its `model_sha256` yet.

        Args:
            run_id: MLflow run whose artifacts the model is among, or is put among.
            model: The model's folder.
            metrics: What was measured of it.
            tags: Its lineage.
        """
        return self._ask(lambda: self._register(run_id, model, metrics, tags))

    def promote(self, version: Version) -> Version | None:
        """Gives a version the alias `production`, and returns the one that had it."""
        return self._ask(lambda: self._promote(version))

    def rollback(self) -> tuple[Version, Version]:
        """Gives the alias back to the version that had it before.

        Returns:
            The version that was in production, and the one that is now.
        """
        return self._ask(self._rollback)

    def _production(self) -> Version | None:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415 - seconds long

        try:
            return self._read(self._store.client.get_model_version_by_alias(self.name, ALIAS))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _register(self, run_id: str, model: Path, metrics: Mapping[str, float], tags: Mapping[str, str]) -> Version:
        client = self._store.client
        if not client.search_registered_models(f"name = '{self.name}'"):
            client.create_registered_model(self.name)
        known = client.search_model_versions(f"name = '{self.name}'")
        same = [found for found in known if found.tags.get(f"{PREFIX}model_sha256") == tags[f"{PREFIX}model_sha256"]]
        if same:
            return self._read(max(same, key=lambda found: int(found.version)))
        if not client.list_artifacts(run_id, model.name):
            self._store.send_artifact(run_id, model, "")
        made = client.create_model_version(
            self.name,
            source=f"{client.get_run(run_id).info.artifact_uri}/{model.name}",
            run_id=run_id,
            tags={**tags, METRICS_TAG: json.dumps(dict(metrics))},
        )
        return self._read(made)

    def _promote(self, version: Version) -> Version | None:
        before = self._production()
        if before is not None and before.number == version.number:
            return before
        if before is not None:
            self._write_history([*self._history(), before.number])
        self._store.client.set_registered_model_alias(self.name, ALIAS, str(version.number))
        return before

    def _rollback(self) -> tuple[Version, Version]:
        now = self._production()
        history = self._history() if now else []
        if now is None or not history:
            state = "no version" if now is None else f"version {now.number}, the first one that was ever there"
            raise RegistryError(
                f"{self.name} has {state} in production: there is none to go back to; `run.py promote RUN` puts one there."
            )
        earlier = self._read(self._store.client.get_model_version(self.name, str(history[-1])))
        self._store.client.set_registered_model_alias(self.name, ALIAS, str(earlier.number))
        # A rollback that is cut short here leaves a history that names the version in production: it is passed over.
        self._write_history(history[:-1])
        return now, earlier

    def _history(self) -> list[int]:
        tags = self._store.client.get_registered_model(self.name).tags
        now = self._production()
        history: list[int] = json.loads(tags.get(HISTORY_TAG, "[]"))
        while history and now is not None and history[-1] == now.number:
            history.pop()
        return history

    def _write_history(self, history: list[int]) -> None:
        text = json.dumps(history[-LONGEST_HISTORY:])
        self._store.client.set_registered_model_tag(self.name, HISTORY_TAG, text)

    def _read(self, found: "ModelVersion") -> Version:
        return Version(number=int(found.version), source=found.source, run_id=found.run_id, tags=found.tags)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        answers: list[Answer] = []
        error = attempt(lambda: answers.append(question()))
        if isinstance(error, RegistryError):
            raise error
        if error is not None:
            raise RegistryError(
                f"MLflow's registry at {self._store.safe_uri}, model {self.name}: {' '.join(str(error).split())}; mend "
                "logging.mlflow_tracking_uri or promotion.registered_model, or start again once the store answers."
            ) from error
        return answers[0]
