"""The prototype workflow, really run, and what ZenML's cache makes of the runs after it."""

import json
import shutil

import pytest

from pipelines.prototype import prototype_pipeline
from steps import caching
from ultrathink_model.config import load_config
from ultrathink_model.workflow import WORKFLOWS

pytestmark = [
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]

CHECK = "check:training.max_steps=2"


def run(*overrides):
    """Runs the pipeline and returns the status of each step."""
    done = prototype_pipeline(config="small.yaml", overrides=[CHECK, *overrides])
    assert done.status == "completed"
    return {name: str(step.status) for name, step in done.steps.items()}, done


@pytest.fixture(scope="module")
def first_run(workspace):
    return run()


@pytest.fixture
def folder(workspace, first_run):
    return workspace / "outputs" / "small" / "prototype"


def test_the_data_set_card_is_an_artifact_and_a_page_of_the_dashboard(first_run):
    outputs = first_run[1].steps["prepare_data"].outputs
    reference, card = outputs["data"][0].load(), outputs["dataset_card"][0]
    assert reference.fingerprint in card.load()
    assert [view.type.value for view in card.visualizations] == ["html"]
    assert "dataset_card.md" in reference.files


def test_every_step_completes_in_order(first_run):
    statuses, done = first_run
    assert statuses == dict.fromkeys(WORKFLOWS["prototype"].steps, "completed")
    by_time = sorted(done.steps, key=lambda name: done.steps[name].start_time)
    assert tuple(by_time) == WORKFLOWS["prototype"].steps


def test_the_workflow_leaves_run_folders_an_export_and_a_report(folder):
    for stage in ("check", "pretrain"):
        for name in ("config.yaml", "training.log", "metrics.jsonl", "report.html", "final_model/model.safetensors"):
            assert (folder / stage / name).is_file(), f"{stage}/{name}"
        assert list((folder / stage).glob("checkpoint_*.pt/manifest.json"))
    assert load_config(folder / "check" / "config.yaml").data.dataset == "dummy"
    assert (folder / "pretrain" / "evaluation.json").is_file()
    assert (folder / "export" / "model.safetensors").is_file()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "check" in page
    assert "pretrain" in page


def test_steps_pass_json_references_and_a_page_and_no_pickles(first_run):
    _, done = first_run
    outputs = [output for step in done.steps.values() for found in step.outputs.values() for output in found]
    assert {output.materializer.attribute for output in outputs} == {
        "PydanticMaterializer",
        "StructuredStringMaterializer",
    }
    for output in outputs:
        if output.name not in ("report_page", "dataset_card"):
            assert output.load().is_intact()


def test_the_report_is_shown_on_the_dashboard(first_run):
    _, done = first_run
    page = done.steps["report"].outputs["report_page"][0]
    assert [str(visualization.type) for visualization in page.visualizations] == ["html"]


def test_mlflow_holds_one_run_with_a_child_for_each_stage(folder):
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("ultrathink")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"prototype", "check", "pretrain"}
    parent = runs["prototype"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for name in ("check", "pretrain"):
        assert runs[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {"train/loss", "val/loss", "train/learning_rate", "train/grad_norm"} <= runs[name].data.metrics.keys()
    evaluation = json.loads((folder / "pretrain" / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
    assert runs["pretrain"].data.metrics.items() >= evaluation.items()
    assert parent.data.metrics == pytest.approx(evaluation)
    artifacts = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"config.yaml", "evaluation.json", "export", "report.html"}


def test_the_same_run_again_comes_from_the_cache(first_run):
    statuses, _ = run()
    assert set(statuses.values()) == {"cached"}


@pytest.mark.slow
def test_a_stage_whose_folder_is_gone_is_made_again(folder):
    shutil.rmtree(folder / "pretrain")
    statuses, _ = run()
    again = {name for name, status in statuses.items() if status == "completed"}
    assert again == {"pretrain", "evaluate_pretrain", "export", "report"}
    assert (folder / "pretrain" / "final_model" / "model.safetensors").is_file()
    assert set(run()[0].values()) == {"cached"}


@pytest.mark.slow
def test_a_touched_model_is_restored_without_training(folder, capfd):
    weights = folder / "pretrain" / "final_model" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\0\0\1\0")
    statuses, _ = run()
    assert statuses["pretrain"] == "completed"
    assert weights.read_bytes() == good
    assert "pretrain: step" not in capfd.readouterr().out


@pytest.mark.slow
def test_a_changed_corpus_is_prepared_and_trained_on(folder, workspace):
    corpus = workspace / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8") * 2, encoding="utf-8")
    statuses, done = run()
    assert (statuses["check"], statuses["prepare_data"], statuses["pretrain"]) == ("cached", "completed", "completed")
    assert done.steps["prepare_data"].outputs["data"][0].load().is_intact()


@pytest.mark.slow
def test_changed_code_makes_its_stage_anew(folder, monkeypatch):
    real = caching.hash_code
    before = json.loads((folder / "pretrain" / "run.json").read_text(encoding="utf-8"))["started_at"]

    def changed(names):
        return real(names) + ("changed" if "training" in names else "")

    monkeypatch.setattr(caching, "hash_code", changed)
    statuses, _ = run()
    assert (statuses["prepare_data"], statuses["pretrain"]) == ("cached", "completed")
    assert json.loads((folder / "pretrain" / "run.json").read_text(encoding="utf-8"))["started_at"] > before
    assert list((folder / "pretrain" / "previous").glob("pretrain*/metrics.jsonl"))
