"""run.py status and run.py rerun, on runs of the prototype: what is shown, what is done again, what a failure leaves."""

import json

import pytest

from pipelines import rerun_command, status_command
from pipelines.start import run_workflow
from steps.failure import resume_command
from ultrathink_model.errors import ConfigError
from ultrathink_model.workflow import plan_workflow

pytestmark = [
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]

OVERRIDES = ["check:training.max_steps=2", "logging.use_mlflow=false", "output.output_dir=runs", "training.max_steps=4"]


@pytest.fixture(scope="module")
def last_run(workspace):
    from zenml.client import Client

    plan = plan_workflow("prototype", None, "small.yaml", OVERRIDES)
    run_workflow(plan, None, "small.yaml", OVERRIDES)

    def find():
        runs = Client().list_pipeline_runs(pipeline_name="prototype_pipeline", sort_by="desc:created", hydrate=True)
        return runs.items[0]

    return find


@pytest.mark.slow
def test_status_names_runs_stages_and_places(last_run, workspace, capsys):
    status_command.main(["--last", "1"])
    out = capsys.readouterr().out
    assert f"{last_run().name}: completed" in out
    assert "+prepare_dummy +check +prepare_data +pretrain +evaluate_pretrain +export +report" in out
    assert f"in {workspace / 'runs' / 'prototype'}, on default" in out


@pytest.mark.slow
def test_rerun_from_a_step_does_it_and_those_after_it_anew(last_run, workspace):
    record = workspace / "runs" / "prototype" / "pretrain" / "run.json"
    before = json.loads(record.read_text())["started_at"]
    first = last_run()
    rerun_command.main([first.name, "--from", "pretrain"])
    statuses = {name: step.status.value for name, step in last_run().steps.items()}
    assert [name for name, status in statuses.items() if status == "completed"] == [
        "pretrain",
        "evaluate_pretrain",
        "export",
        "report",
    ]
    assert json.loads(record.read_text())["started_at"] > before
    rerun_command.main([str(last_run().id), "--set", "pretrain:training.max_steps=5"])
    statuses = {name: step.status.value for name, step in last_run().steps.items()}
    assert statuses["check"] == "cached"
    assert statuses["pretrain"] == "completed"
    assert (workspace / "runs" / "prototype" / "pretrain" / "checkpoint_00000005.pt").is_dir()


@pytest.mark.slow
def test_a_failure_leaves_reason_log_and_the_command_that_goes_on(last_run, capsys):
    overrides = [*OVERRIDES, "output.output_dir=failing", "pretrain:training.learning_rate=1e30"]
    overrides += ["pretrain:training.max_bad_steps=1", "pretrain:training.gradient_clipping=1e30"]
    plan = plan_workflow("prototype", None, "small.yaml", overrides)
    with pytest.raises(Exception, match="loss"):
        run_workflow(plan, None, "small.yaml", overrides)
    failure = last_run().run_metadata["failure"]
    assert failure["step"] == "pretrain"
    assert "loss" in failure["reason"]
    assert "an epoch is" in failure["log_tail"]
    assert failure["resume_command"].startswith("python run.py --workflow prototype --config small.yaml --override")
    status_command.main(["--last", "1"])
    out = capsys.readouterr().out
    assert "!pretrain" in out
    assert f"go on: {failure['resume_command']}" in out


@pytest.mark.slow
def test_a_run_or_step_that_is_not_there_is_refused(last_run):
    with pytest.raises(ConfigError, match=r"run\.py status"):
        rerun_command.main(["nothing"])
    with pytest.raises(ConfigError, match="it has prepare_dummy, check"):
        rerun_command.main([last_run().name, "--from", "sft"])


@pytest.mark.slow
def test_the_local_orchestrator_has_no_schedules(workspace):
    plan = plan_workflow("prototype", None, "small.yaml", OVERRIDES)
    with pytest.raises(ConfigError, match="has no schedules"):
        run_workflow(plan, None, "small.yaml", OVERRIDES, schedule="0 3 * * *")


def test_the_resume_command_holds_everything_that_was_given():
    parameters = {"profile": "tiny", "config": None, "overrides": ["a.b=1", "data.dataset=my texts/"]}
    assert resume_command("production_pipeline", parameters, "ultrathink_vertex") == (
        "python run.py --workflow production --profile tiny --stack ultrathink_vertex --override a.b=1 "
        "'data.dataset=my texts/'"
    )
