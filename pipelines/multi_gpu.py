"""Workflow 3: the same training over several ranks."""

from zenml import pipeline
from zenml.enums import ExecutionMode

from pipelines.planning import begin
from steps.evaluate import evaluate
from steps.export import export
from steps.failure import note_failure
from steps.prepare_data import prepare_data
from steps.pretrain import pretrain
from steps.report import report


@pipeline(name="multi_gpu_pipeline", execution_mode=ExecutionMode.FAIL_FAST, on_failure=note_failure)
def multi_gpu_pipeline(
    profile: str | None = None, config: str | None = None, overrides: list[str] | None = None
) -> None:
    """Prepares data, trains over the ranks of `distributed`, evaluates, exports and reports.

    Args:
        profile: `auto` (also when neither it nor `config` is given), `tiny`, `small`, `medium` or `large`.
        config: A config file in place of a profile's.
        overrides: Each `section.key=value`, or `stage:section.key=value` for one stage.
    """
    plan = begin("multi_gpu", profile, config, overrides)
    data, _ = prepare_data(plan["prepare_data"], id="prepare_data")
    trained = pretrain(plan["pretrain"], data, id="pretrain")
    evaluation = evaluate(plan["evaluate_pretrain"], data, trained, id="evaluate_pretrain")
    exported = export(plan["export"], trained, evaluation, id="export")
    report(plan["report"], [trained], [evaluation], exported, id="report")
