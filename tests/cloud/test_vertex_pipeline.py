"""The production workflow through Vertex AI's REST interface on loopback: the compiled job, and each task's command run here.

gcp-storage-emulator stands in for Cloud Storage. Runs in `.venv/gcp` (`make test-cloud`).
"""

import json
import subprocess
import sys
import urllib.request
from typing import NamedTuple

import pytest
import yaml
from loopback import MARKS, ROOT, Machine, clean_environment, run_cli, write_config, zenml_server
from vertex_service import cloud_storage, vertex_service, write_service_account

from ultrathink_model.workflow import WORKFLOWS

pytest.importorskip("google.cloud.aiplatform", reason="needs .venv/gcp (make test-cloud)")
pytest.importorskip("gcp_storage_emulator", reason="needs .venv/gcp (make test-cloud)")

pytestmark = [*MARKS, pytest.mark.timeout(3600)]

PROJECT, LOCATION, BUCKET, REPOSITORY = "my-project", "europe-west4", "models", "images"
IMAGE = f"{LOCATION}-docker.pkg.dev/{PROJECT}/{REPOSITORY}/ultrathink:test"
VALUES = (
    f"project={PROJECT}", f"location={LOCATION}", f"bucket={BUCKET}", f"repository={REPOSITORY}", "name=trainer",
)  # fmt: skip
STEPS = tuple(name for name in WORKFLOWS["production"].steps if not name.endswith("constitutional"))
TRAINS = tuple(stage.name for stage in WORKFLOWS["production"].stages if stage.name in STEPS)
# What a user's process would find at europe-west4-aiplatform.googleapis.com is at the address that is given first.
LAUNCH = (
    "import runpy, sys; from google.cloud import aiplatform; "
    "aiplatform.init(api_endpoint=sys.argv.pop(1), api_transport='rest'); "
    "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
)


class Cloud(NamedTuple):
    """What the tests share: the service, the environment that reaches it, and a folder with config and settings."""

    vertex: object
    client: dict
    environment: dict
    folder: object

    def submit(self, *arguments):
        """Starts run.py on the stack as a user does."""
        command = [sys.executable, "-c", LAUNCH, self.vertex.url, str(ROOT / "run.py"), "--workflow", "production"]
        command += ["--config", str(self.folder / "small.yaml"), "--stack", "vertex"]
        command += ["--run-settings", str(self.folder / "settings.yaml"), *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=clean_environment() | self.client | self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def resource(self, kind, process):
        """The one resource of a kind, once the process has made it."""
        while not (found := self.vertex.of(kind)):
            try:
                output, _ = process.communicate(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            if not self.vertex.of(kind):
                raise AssertionError(output)
        (resource,) = found
        return resource

    def objects(self, prefix):
        """Size of each object, by its name after a prefix."""
        url = f"{self.environment['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o?prefix={prefix}"
        with urllib.request.urlopen(url) as answer:
            items = json.load(answer).get("items", [])
        return {item["name"].removeprefix(prefix): int(item["size"]) for item in items}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """The stack of Vertex AI, applied to a ZenML that counts as remote."""
    folder = tmp_path_factory.mktemp("vertex")
    with (
        vertex_service() as vertex,
        cloud_storage(BUCKET, folder / "storage.log") as storage,
        zenml_server(folder) as client,
    ):
        key = write_service_account(vertex, PROJECT, folder / "account.json")
        environment = storage | {"GOOGLE_APPLICATION_CREDENTIALS": str(key)}
        stack = str(ROOT / "stack_configs" / "vertex.yaml")
        run_cli(["stacks", "apply", stack, "--values", *VALUES], client | environment, folder)
        settings = yaml.safe_load((ROOT / "stack_configs" / "run_settings" / "vertex.yaml").read_text())
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings | {"image": IMAGE}))
        write_config(folder)
        yield Cloud(vertex, client, environment, folder)


def tasks_of(job):
    """The tasks of a compiled job by their steps: each one's custom job, and the steps that it waits for."""
    specification = job["pipelineSpec"]
    tasks = specification["root"]["dag"]["tasks"]
    names = {key: task["taskInfo"]["name"] for key, task in tasks.items()}
    found = {}
    for key, task in tasks.items():
        inputs = specification["components"][task["componentRef"]["name"]]["inputDefinitions"]["parameters"]
        custom = {name: entry["defaultValue"] for name, entry in inputs.items() if "defaultValue" in entry}
        found[names[key]] = custom, {names[other] for other in task.get("dependentTasks", ())}
    return found


def container(custom, job):
    """A task's container command and environment, as Vertex AI would start it."""
    (pool,) = custom["worker_pool_specs"]
    specification = pool["container_spec"]
    run = job["name"].rpartition("/")[2]
    environment = {
        entry["name"]: entry["value"].replace("{{$.pipeline_job_name}}", run) for entry in specification["env"]
    }
    return [*specification["command"], *specification["args"]], environment


def check_machines(tasks):
    """Asserts machines, GPUs, disks, spot and timeouts of each step."""
    assert set(tasks) == set(STEPS)
    pools = {name: custom["worker_pool_specs"] for name, (custom, _) in tasks.items()}
    assert {len(pool) for pool in pools.values()} == {1}
    gpu = {"machine_type": "g2-standard-12", "accelerator_type": "NVIDIA_L4", "accelerator_count": 1}
    plain = {"machine_type": "n2-standard-8"}
    on_gpus = {*TRAINS, *(name for name in STEPS if name.startswith("evaluate_"))}
    assert {name: pool[0]["machine_spec"] for name, pool in pools.items()} == {
        name: gpu if name in on_gpus else plain for name in STEPS
    }
    assert {pool[0]["disk_spec"]["boot_disk_size_gb"] for pool in pools.values()} == {200}
    assert {pool[0]["container_spec"]["image_uri"] for pool in pools.values()} == {IMAGE}
    customs = {name: custom for name, (custom, _) in tasks.items()}
    assert {name for name, custom in customs.items() if custom["strategy"] == "SPOT"} == set(TRAINS)
    assert {name for name, custom in customs.items() if custom["restart_job_on_worker_restart"]} == set(TRAINS)
    assert (customs["baseline"]["timeout"], customs["evaluate_rlhf"]["timeout"]) == (f"{120 * 3600}s", f"{4 * 3600}s")
    assert {custom["service_account"] for custom in customs.values()} == {f"trainer@{PROJECT}.iam.gserviceaccount.com"}


def test_each_tasks_command_runs_on_an_empty_machine_until_the_run_is_completed(cloud):
    process = cloud.submit()
    job = cloud.resource("pipelineJobs", process)
    try:
        assert job["name"].startswith(f"projects/{PROJECT}/locations/{LOCATION}/pipelineJobs/production-pipeline-")
        assert job["runtimeConfig"]["gcsOutputDirectory"] == f"gs://{BUCKET}/vertex"
        tasks = tasks_of(job)
        check_machines(tasks)
        machine, done = Machine(cloud.folder / "machine", cloud.environment), set()
        while done != set(tasks):
            name = next(name for name, (_, before) in tasks.items() if name not in done and before <= done)
            machine.run(*container(tasks[name][0], job))
            done.add(name)
        job["state"] = "PIPELINE_STATE_SUCCEEDED"
    except BaseException:
        job["state"] = "PIPELINE_STATE_FAILED"
        process.kill()
        raise
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"results go to gs://{BUCKET}/ultrathink/runs/outputs/small/production" in output
    assert "Done: production" in output
    there = cloud.objects("ultrathink/runs/outputs/small/production/")
    for name in ("report.html", "export/model.safetensors", "rlhf/final_model/model.safetensors"):
        assert there[name] > 0, name
    status = run_cli(["status", "--last", "1"], cloud.client | cloud.environment, cloud.folder)
    assert ": completed" in status
    assert f"in gs://{BUCKET}/ultrathink/runs/outputs/small/production, on ultrathink_vertex" in status


def test_a_schedule_is_vertex_ais_own(cloud):
    process = cloud.submit("--schedule", "0 3 * * 0")
    schedule = cloud.resource("schedules", process)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert schedule["cron"] == "0 3 * * 0"
    tasks = tasks_of(schedule["createPipelineJobRequest"]["pipelineJob"])
    check_machines(tasks)
