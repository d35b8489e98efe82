"""A Vertex AI custom job on loopback: what is submitted, and its container command run here with a bucket of its own.

Only the one call to Vertex AI is answered by the test; gcp-storage-emulator stands in for Cloud Storage. Runs in
`.venv/gcp` (`make test-cloud`).
"""

import importlib.util
import json
import sys
import urllib.request

import pytest
from loopback import MARKS, ROOT, Machine
from vertex_service import cloud_storage

aiplatform = pytest.importorskip("google.cloud.aiplatform", reason="needs .venv/gcp (make test-cloud)")
pytest.importorskip("gcp_storage_emulator", reason="needs .venv/gcp (make test-cloud)")

pytestmark = [
    *MARKS,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

BUCKET = "models"
TINY = (
    "model.num_layers=2", "model.max_seq_length=32", "data.dataset=dummy", "data.train_samples=64",
    "evaluation.eval_samples=8", "evaluation.num_generations=0", "training.max_steps=2",
)  # fmt: skip


@pytest.fixture
def storage(tmp_path):
    with cloud_storage(BUCKET, tmp_path / "storage.log") as environment:
        yield environment


@pytest.fixture
def submitted(monkeypatch):
    """The job as the script submits it: the request that Vertex AI gets."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.aiplatform_v1.services.job_service import JobServiceClient
    from google.cloud.aiplatform_v1.types import CustomJob

    requests = []

    def create(self, parent=None, custom_job=None, **_):
        requests.append((parent, custom_job))
        answer = CustomJob(custom_job)
        answer.name = f"{parent}/customJobs/1"
        return answer

    monkeypatch.setattr(JobServiceClient, "create_custom_job", create)
    monkeypatch.setattr("google.auth.default", lambda **_: (AnonymousCredentials(), "my-project"))
    specification = importlib.util.spec_from_file_location(
        "vertex_training", ROOT / "scripts" / "cloud" / "vertex_training.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def submit(*arguments):
        monkeypatch.setattr(sys, "argv", ["vertex_training.py", *arguments])
        module.main()
        ((parent, job),) = requests
        return parent, job

    return submit


def test_the_job_has_its_machines_and_its_command_trains_with_the_runs_folder_in_the_bucket(
    submitted, storage, tmp_path
):
    parent, job = submitted(
        *("--project", "my-project", "--location", "europe-west4", "--bucket", BUCKET, "--image", "ultrathink:cuda"),
        *("--profile", "tiny", "--machine-type", "a2-highgpu-8g", "--accelerator", "NVIDIA_TESLA_A100"),
        *("--accelerators", "8", "--hours", "2", "--override", "distributed.enabled=false", *TINY),
    )
    assert parent == "projects/my-project/locations/europe-west4"
    (pool,) = job.job_spec.worker_pool_specs
    assert pool.machine_spec.machine_type == "a2-highgpu-8g"
    assert (pool.machine_spec.accelerator_type.name, pool.machine_spec.accelerator_count) == ("NVIDIA_TESLA_A100", 8)
    assert pool.container_spec.image_uri == "ultrathink:cuda"
    scheduling = job.job_spec.scheduling
    assert (scheduling.strategy.name, scheduling.timeout.total_seconds()) == ("SPOT", 7200)
    assert scheduling.restart_job_on_worker_restart

    machine = Machine(tmp_path / "machine", storage)
    command = [*pool.container_spec.command, *pool.container_spec.args]
    assert command[:2] == ["python", "train_advanced.py"]
    command = [word.replace("=/tmp/", f"={machine.folder}/") for word in command]
    command[1], command[3] = str(ROOT / command[1]), str(ROOT / command[3])
    machine.run(command, {})
    url = f"{storage['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o?prefix=runs/vertex/"
    with urllib.request.urlopen(url) as answer:
        names = {entry["name"] for entry in json.load(answer)["items"]}
    assert {"runs/vertex/run.json", "runs/vertex/final_model/model.safetensors"} <= names
    assert any(name.endswith(".pt/manifest.json") for name in names)
    # The same job on another machine finds the run finished.
    assert "is finished already" in machine.run(command, {})
