"""The Dockerfile by hadolint, and the Kubernetes manifests by the API's own schemas. Runs in `.venv/aws`."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from loopback import ROOT

HADOLINT = Path(sys.executable).parent / "hadolint"


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs .venv/aws (make test-cloud)")
def test_the_dockerfile_is_clean():
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not done.stdout


def test_the_image_is_locked_and_runs_as_nobody_in_particular():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "USER 1000:1000" in text
    assert text.count("--constraint constraints.txt") == 2
    assert {"AS cpu", "AS cuda"} <= {f"AS {line.rpartition(' AS ')[2]}" for line in text.splitlines() if " AS " in line}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_manifests_keep_kubernetes_schema():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs .venv/aws (make test-cloud)")
    path = ROOT / "stack_configs" / "nodes" / "kubernetes_torchrun.yaml"
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        kubernetes_validate.validate(document, "1.30", strict=True)
