"""A run again from ZenML's dashboard: a deployment's Playground, in a real browser."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from browser import EXECUTABLE, Browser
from services import free_port, service

from pipelines import status_command
from pipelines.abandoned import is_abandoned, running_runs

ROOT = Path(__file__).resolve().parents[2]
ZENML = str(Path(sys.executable).parent / "zenml")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs chromium (apt-get install chromium)"),
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]


@pytest.fixture
def dashboard(workspace):
    """ZenML's server over this test's store, as `zenml login --local` starts it, past its questions to new users."""
    from zenml.client import Client

    Client().update_user("default", updated_email_opt_in=False, updated_metadata={"finished_onboarding_survey": True})
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "zenml.zen_server.zen_server_api:app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    environment = os.environ | {"ZENML_SERVER": "true", "ZENML_SERVER_AUTH_SCHEME": "NO_AUTH"}
    with service(command, f"http://127.0.0.1:{port}", workspace / "dashboard.log", environment) as url:
        yield url


@pytest.fixture
def deployment(workspace):
    """The prototype, deployed as a user does it."""
    from zenml.client import Client

    overrides = [f"output.output_dir={workspace / 'deployed'}", f"data.dataset={workspace / 'corpus.jsonl'}"]
    overrides += [f"data.cache_dir={workspace / 'data'}", "logging.use_mlflow=false", "check:training.max_steps=2"]
    parameters = {"config": str(workspace / "small.yaml"), "overrides": overrides}
    (workspace / "deployment.yaml").write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
    command = [ZENML, "pipeline", "deploy", "prototype_pipeline", "-n", "again", "-c", workspace / "deployment.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        yield Client().get_deployment("again")
    finally:
        Client().delete_deployment("again", timeout=60)


def wait_for_run(deployment):
    """The run of a deployment, once ZenML has it running; other tests leave runs that a kill cut off."""
    deadline = time.monotonic() + 60
    while True:
        for run in running_runs("prototype_pipeline"):
            if run.trigger_info is not None and run.trigger_info.deployment_id == deployment.id:
                return run
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_playground_runs_the_workflow_again(dashboard, deployment, workspace, tmp_path, capsys):
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"{dashboard}/projects/default/deployments", width=1600)
        browser.press("again")
        browser.press("Playground")
        browser.press("Run")
        browser.wait_for("document.body.innerText.includes('Invoking Endpoint')")
        run = wait_for_run(deployment)
        # A deployment's run holds no lock; it is not taken for one that a kill left.
        assert not is_abandoned(run)
        browser.wait_for("document.body.innerText.includes('Run Details')", seconds=400)
        shown = browser.evaluate("document.body.innerText")
    assert run.name in shown
    assert "Completed" in shown
    assert (workspace / "deployed" / "prototype" / "report.html").is_file()
    status_command.main(["--last", "1"])
    assert f"{run.name}: completed" in capsys.readouterr().out

    # Other settings than the deployed ones are refused, not passed over.
    request = urllib.request.Request(
        f"{deployment.url}/invoke",
        json.dumps({"parameters": {"overrides": ["training.max_steps=3"]}}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        refused = json.load(answer)
    assert not refused["success"]
    assert "zenml pipeline deploy NAME -c FILE --update" in refused["error"]
