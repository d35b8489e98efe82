"""A run's model on its way into production: judged, registered with its lineage, and given the alias."""

from pathlib import Path

from ultrathink_model.config import Config
from ultrathink_model.config.gates import read_gates
from ultrathink_model.errors import ConfigError
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.promotion.decision import Decision, decide
from ultrathink_model.promotion.lineage import PREFIX, read_lineage
from ultrathink_model.promotion.registry import ModelRegistry, Version
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.tracking.run_folder import RunFolder


def judge_run(run: RunFolder, config: Config) -> Decision:
    """Compares a run with its gates and, where `logging.use_mlflow` is set, with the model in production.

    The decision is left in `gates.json`; nothing is registered.

    Args:
        run: A finished and evaluated run.
        config: `promotion` says which gates and which registered model.

    Raises:
        ConfigError: The run was not evaluated, or the gates cannot be read.
        RegistryError: MLflow's registry cannot be asked.
    """
    gates = read_gates(config.promotion.gates_file)
    record, metrics = run.record(), _measured(run)
    production = ModelRegistry(config).production() if config.logging.use_mlflow else None
    decision = decide(
        gates,
        metrics,
        production.metrics if production else None,
        name=record.run_name if record else run.path.name,
        production_version=production.number if production else None,
    )
    decision.save(run.gates_file)
    return decision


def promote_run(run: RunFolder, config: Config, decision: Decision, model: Path, mlflow_run_id: str | None) -> Version:
    """Registers a run's model with its lineage and gives it the alias `production`.

    The same model is registered once: to promote it again moves the alias alone.

    Args:
        run: The run.
        config: `logging` names the store, `promotion.registered_model` the model.
        decision: What `judge_run` came to.
        model: The folder to register: the run's `final_model/`, or its export.
        mlflow_run_id: MLflow run whose artifact the model becomes.

    Returns:
        The version in production now.

    Raises:
        GateError: The decision is against it; nothing is registered.
        ConfigError: The run is not tracked in MLflow.
        RegistryError: MLflow's registry cannot do it.
    """
    decision.check()
    if mlflow_run_id is None:
        raise ConfigError(
            f"{run.path} has no MLflow run that its model could be registered with; train with logging.use_mlflow=true."
        )
    registry = ModelRegistry(config)
    tags = read_lineage(run, _evaluation(run)).tags() | {f"{PREFIX}gates": decision.reason}
    version = registry.register(mlflow_run_id, model, _measured(run), tags)
    registry.promote(version)
    return version


def _evaluation(run: RunFolder) -> EvaluationResult:
    try:
        return EvaluationResult.load(run.evaluation_file)
    except FileNotFoundError:
        raise ConfigError(
            f"{run.path} holds no evaluation.json; start its command again, which evaluates what is trained."
        ) from None


def _measured(run: RunFolder) -> dict[str, float]:
    """The last value of each metric of the run, and its evaluation's."""
    measured: dict[str, float] = {}
    for row in read_metrics(run.metrics_file):
        measured |= {name: value for name, value in row.items() if "/" in name}
    return measured | _evaluation(run).metrics
