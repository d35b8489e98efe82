"""The production workflow through SageMaker's API on loopback: what is submitted, and each step's command run here.

moto stands in for SageMaker and S3. Runs in `.venv/aws` (`make test-cloud`).
"""

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from loopback import MARKS, ROOT, Machine, run_cli, stop_after, write_config, zenml_server
from services import free_port, service

from ultrathink_model.workflow import WORKFLOWS

boto3 = pytest.importorskip("boto3", reason="needs .venv/aws (make test-cloud)")
pytest.importorskip("sagemaker", reason="needs .venv/aws (make test-cloud)")
pytest.importorskip("moto", reason="needs .venv/aws (make test-cloud)")

pytestmark = [*MARKS, pytest.mark.timeout(3000)]

REGION, ACCOUNT, BUCKET = "eu-central-1", "123456789012", "models"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/ultrathink:test"
VALUES = (f"account={ACCOUNT}", "sagemaker-role=trainer", f"region={REGION}", f"bucket={BUCKET}")
STEPS = tuple(name for name in WORKFLOWS["production"].steps if not name.endswith("constitutional"))
TRAINS = tuple(stage.name for stage in WORKFLOWS["production"].stages if stage.name in STEPS)


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """SageMaker and S3 on loopback, with a bucket: what an environment needs to reach them."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
    }
    log = tmp_path_factory.mktemp("moto") / "moto.log"
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with service(command, url, log, os.environ), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        yield environment


@pytest.fixture(scope="module")
def submitted(aws, tmp_path_factory):
    """The production workflow, submitted as a user does: the environment, and the definition's steps by name."""
    folder = tmp_path_factory.mktemp("sagemaker")
    with zenml_server(folder) as client:
        environment = client | aws
        run_cli(
            ["stacks", "apply", str(ROOT / "stack_configs" / "sagemaker.yaml"), "--values", *VALUES],
            environment,
            folder,
        )
        settings = yaml.safe_load((ROOT / "stack_configs" / "run_settings" / "sagemaker.yaml").read_text())
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings | {"image": IMAGE}))
        arguments = ["--workflow", "production", "--config", str(write_config(folder)), "--stack", "sagemaker"]
        arguments += ["--run-settings", str(folder / "settings.yaml")]
        arguments += ["--override", "baseline:training.max_steps=300", "baseline:training.checkpoint_steps=100"]
        arguments += ["baseline:training.num_epochs=100"]
        output = run_cli(arguments, environment, folder)
        assert f"results go to s3://{BUCKET}/ultrathink/runs/outputs/small/production" in output
        assert "metrics are kept in the runs' folders alone" in output
        service_api = boto3.client("sagemaker")
        (pipeline,) = service_api.list_pipelines()["PipelineSummaries"]
        described = service_api.describe_pipeline(PipelineName=pipeline["PipelineName"])
        (execution,) = service_api.list_pipeline_executions(PipelineName=pipeline["PipelineName"])[
            "PipelineExecutionSummaries"
        ]
        steps = {step["Name"]: step for step in json.loads(described["PipelineDefinition"])["Steps"]}
        yield environment, steps, execution["PipelineExecutionArn"], folder


def objects(prefix):
    listed = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"].removeprefix(prefix): entry["Size"] for page in listed for entry in page.get("Contents", ())}


def job(step, execution):
    """A step's container command and environment, as SageMaker would start it."""
    arguments = step["Arguments"]
    specification = arguments["AlgorithmSpecification"]
    environment = {
        name: execution if isinstance(value, dict) else value for name, value in arguments["Environment"].items()
    }
    return [*specification["ContainerEntrypoint"], *specification["ContainerArguments"]], environment


def test_the_definition_has_machines_spot_and_timeouts_for_each_step(submitted):
    _, steps, _, _ = submitted
    assert set(steps) == set(STEPS)
    assert steps["report"]["DependsOn"]
    machines = {name: step["Arguments"]["ResourceConfig"] for name, step in steps.items()}
    assert {name for name, machine in machines.items() if machine["InstanceType"] == "ml.g5.2xlarge"} == {
        *TRAINS, *(name for name in STEPS if name.startswith("evaluate_")),
    }  # fmt: skip
    assert {machine["InstanceCount"] for machine in machines.values()} == {1}
    assert {machine["VolumeSizeInGB"] for machine in machines.values()} == {200}
    spot = {name for name, step in steps.items() if step["Arguments"].get("EnableManagedSpotTraining")}
    assert spot == set(TRAINS)
    stopping = steps["baseline"]["Arguments"]["StoppingCondition"]
    assert stopping == {"MaxRuntimeInSeconds": 120 * 3600, "MaxWaitTimeInSeconds": 144 * 3600}
    assert steps["evaluate_rlhf"]["Arguments"]["StoppingCondition"]["MaxRuntimeInSeconds"] == 4 * 3600
    assert {step["Arguments"]["AlgorithmSpecification"]["TrainingImage"] for step in steps.values()} == {IMAGE}
    assert steps["baseline"]["Arguments"]["RoleArn"] == f"arn:aws:iam::{ACCOUNT}:role/trainer"


def test_each_steps_command_runs_on_an_empty_machine_until_the_run_is_completed(submitted):
    environment, steps, execution, folder = submitted
    machine = Machine(
        folder / "machine", {name: value for name, value in environment.items() if name.startswith("AWS_")}
    )
    machine.run(*job(steps["prepare_data"], execution))

    # The baseline's spot machine is taken back: what it had saved is in S3, and the next one goes on from there.
    machine.replace()
    process = machine.start(*job(steps["baseline"], execution))
    output = stop_after(process, "step 20/300")
    assert process.returncode == 75, output
    assert "and saved in" in output
    baseline = "ultrathink/runs/outputs/small/production/baseline/"
    kept = objects(baseline)
    assert any(name.endswith(".pt/manifest.json") for name in kept)
    assert "result.json" not in kept

    output = machine.run(*job(steps["baseline"], execution))
    assert "goes on after step" in output
    assert "step 2/300" not in output
    rows = boto3.client("s3").get_object(Bucket=BUCKET, Key=f"{baseline}metrics.jsonl")["Body"].read().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if "train/loss" in row] == list(range(1, 301))

    for name in [name for name in steps if name not in ("prepare_data", "baseline")]:
        machine.run(*job(steps[name], execution))
    there = objects("ultrathink/runs/outputs/small/production/")
    for name in (
        "report.html",
        "export/model.safetensors",
        "rlhf/final_model/model.safetensors",
        "rlhf/evaluation.json",
    ):
        assert there[name] > 0, name
    status = run_cli(["status", "--last", "1"], environment, folder)
    assert ": completed" in status
    assert f"in s3://{BUCKET}/ultrathink/runs/outputs/small/production, on ultrathink_sagemaker" in status


def test_a_run_that_loses_its_machine_goes_on_from_s3_on_another(aws, tmp_path):
    machine = Machine(tmp_path / "machine", aws)
    overrides = ["training.max_steps=300", "training.num_epochs=100", "training.checkpoint_steps=100"]
    overrides += [f"output.remote_dir=s3://{BUCKET}/spot", "logging.use_mlflow=false"]
    config = str(write_config(tmp_path))
    command = ["python", str(ROOT / "train_advanced.py"), "--config", config, "--override", *overrides]
    process = machine.start(command, {})
    output = stop_after(process, "step 20/300")
    assert process.returncode == 75, output
    kept = objects("spot/")
    assert any(name.endswith(".pt/manifest.json") for name in kept)
    assert "result.json" not in kept
    output = machine.run(command, {})
    assert "goes on after step" in output
    assert "step 2/300" not in output
    rows = boto3.client("s3").get_object(Bucket=BUCKET, Key="spot/metrics.jsonl")["Body"].read().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if "train/loss" in row] == list(range(1, 301))
    assert objects("spot/")["final_model/model.safetensors"] > 0


def test_the_estimator_submits_train_advanced_and_its_command_trains(aws, tmp_path):
    arguments = ["--role", f"arn:aws:iam::{ACCOUNT}:role/trainer", "--bucket", BUCKET, "--profile", "tiny"]
    arguments += ["--override", "training.max_steps=2", "data.dataset=dummy", "evaluation.num_generations=0"]
    arguments += ["model.num_layers=2", "model.max_seq_length=32", "data.train_samples=64", "evaluation.eval_samples=8"]
    import subprocess

    script = ROOT / "scripts" / "cloud" / "sagemaker_training.py"
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = boto3.client("sagemaker")
    (summary,) = api.list_training_jobs()["TrainingJobSummaries"]
    training = api.describe_training_job(TrainingJobName=summary["TrainingJobName"])
    assert training["ResourceConfig"]["InstanceType"] == "ml.p3.8xlarge"
    assert training["EnableManagedSpotTraining"] is True
    parameters = {name: json.loads(value) for name, value in training["HyperParameters"].items()}
    assert parameters["sagemaker_program"] == "train_advanced.py"
    bucket, _, key = parameters["sagemaker_submit_directory"].removeprefix("s3://").partition("/")
    boto3.client("s3").download_file(bucket, key, str(tmp_path / "code.tar.gz"))
    with tarfile.open(tmp_path / "code.tar.gz") as archive:
        archive.extractall(tmp_path / "code", filter="data")
    config = yaml.safe_load((tmp_path / "code" / parameters["config"]).read_text())
    config["output"]["output_dir"], config["data"]["cache_dir"] = str(tmp_path / "run"), str(tmp_path / "data")
    (tmp_path / "code" / parameters["config"]).write_text(yaml.safe_dump(config))
    # The toolkit of SageMaker's images gives hyperparameters as flags to the entry point.
    command = [sys.executable, parameters["sagemaker_program"], "--config", parameters["config"]]
    command += ["--run-name", parameters["run-name"]]
    done = subprocess.run(command, cwd=tmp_path / "code", capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert objects("runs/sagemaker/")["final_model/model.safetensors"] > 0


def test_a_schedule_is_one_of_eventbridges(submitted):
    environment, _, _, folder = submitted
    arguments = ["--workflow", "production", "--config", str(write_config(folder)), "--stack", "sagemaker"]
    arguments += ["--run-settings", str(folder / "settings.yaml"), "--schedule", "0 3 * * 0"]
    run_cli(arguments, environment, folder)
    api = boto3.client("scheduler")
    (summary,) = api.list_schedules()["Schedules"]
    schedule = api.get_schedule(Name=summary["Name"])
    assert schedule["ScheduleExpression"] == "cron(0 3 ? * SUN *)"
    assert schedule["State"] == "ENABLED"
    assert ":sagemaker:" in schedule["Target"]["Arn"]
