"""The production workflow up to the registry: a model that passes its gates, the cache, and one that does not pass."""

import json
from pathlib import Path

import pytest

from pipelines.production import production_pipeline
from ultrathink_model.config import load_config
from ultrathink_model.errors import GateError
from ultrathink_model.promotion.registry import ModelRegistry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]


QUICK = [
    "output.output_dir=promoted",
    "training.max_steps=2",
    "rlhf.rlhf_iterations=1",
    "evaluation.num_generations=0",
    "evaluation.context_samples=0",
    "evaluation.speed_tokens=0",
]


def run(*overrides):
    done = production_pipeline(config="small.yaml", overrides=[*QUICK, *overrides])
    return {name: str(step.status) for name, step in done.steps.items()}, done


def test_a_model_that_passes_goes_into_production_and_one_that_does_not_leaves_it_alone(workspace):
    statuses, done = run()
    assert set(statuses.values()) == {"completed"}
    folder = workspace / "promoted" / "production"
    config = load_config(folder / "rlhf" / "config.yaml")
    version = ModelRegistry(config).production()
    assert version.source.endswith("/export")
    assert version.run_id == json.loads((folder / "workflow.json").read_text())["mlflow_run_id"]
    names = [stage["name"] for stage in json.loads(version.tags["ultrathink.stages"])]
    assert names == ["baseline", "advanced", "rlhf"]
    evaluation = json.loads((folder / "rlhf" / "evaluation.json").read_text())
    assert version.metrics.items() >= evaluation["metrics"].items()
    assert version.tags["ultrathink.data_fingerprint"] == evaluation["data_fingerprint"]
    assert "is in production" in done.steps["promote"].outputs["production"][0].load()
    assert "Promotion" in (folder / "report.html").read_text(encoding="utf-8")

    (workspace / "strict.yaml").write_text("[{metric: eval/validation/loss, direction: lower, bound: 0.1}]")
    with pytest.raises(
        GateError, match=r"^rlhf is not promoted: eval/validation/loss is .*, above the bound of 0\.1\.$"
    ):
        run("promotion.gates_file=strict.yaml")
    assert ModelRegistry(config).production() == version
    assert "not promoted" in (folder / "report.html").read_text(encoding="utf-8")
    assert Path(folder / "export" / "model.safetensors").is_file()
