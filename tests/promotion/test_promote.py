"""Runs into production and back, on a real MLflow store."""

import json
import shutil

import pytest

from ultrathink_model.config import override_config
from ultrathink_model.config.training import LoggingConfig
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.errors import ConfigError, GateError, RegistryError
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import build_model
from ultrathink_model.promotion import command, rollback
from ultrathink_model.promotion.promote import judge_run, promote_run
from ultrathink_model.promotion.registry import ModelRegistry
from ultrathink_model.tracking.mlflow_store import MlflowStore
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity, find_run
from ultrathink_model.training.result import StageResult

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

GATES = "[{metric: eval/validation/loss, direction: lower, bound: 5, allowed_regression: 0.1}]"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowStore(LoggingConfig(mlflow_tracking_uri=f"sqlite:///{path}")).client.search_experiments()
    return path


@pytest.fixture
def config(tiny_config, tmp_path, empty_store):
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    (tmp_path / "gates.yaml").write_text(GATES, encoding="utf-8")
    return override_config(
        tiny_config,
        [
            "logging.use_mlflow=true",
            f"logging.mlflow_tracking_uri=sqlite:///{tmp_path / 'mlflow.db'}",
            f"logging.mlflow_artifact_dir={tmp_path / 'artifacts'}",
            f"promotion.gates_file={tmp_path / 'gates.yaml'}",
        ],
    )


@pytest.fixture
def make_run(config, tmp_path):
    """Makes the folder of a finished, evaluated run with a model of its own, tracked in MLflow."""
    store = MlflowStore(config.logging)

    def make(name, loss, initial=None):
        own = override_config(config, [f"output.output_dir={tmp_path / name}", f"training.seed={len(name)}"])
        run = RunFolder(tmp_path / name)
        run.begin(RunIdentity.of(own, name, initial.final_model if initial else None), own)
        run.set_mlflow_run_id(store.create_run(name, {}))
        save_model(build_model(own), prepare_data(own).tokenizer_folder, run.final_model)
        StageResult(
            name=name,
            output_dir=str(run.path),
            final_model=str(run.final_model),
            steps=6,
            tokens=768,
            metrics={},
            mlflow_run_id=run.record().mlflow_run_id,
            data_manifest="",
        ).save()
        run.set_status("finished")
        EvaluationResult(
            metrics={"eval/validation/loss": loss}, data_fingerprint="f" * 32, validation_tokens=1, validation_bytes=1
        ).save(run.evaluation_file)
        return run

    return make


def promoted(run, config):
    decision = judge_run(run, config)
    return promote_run(run, config, decision, run.final_model, run.record().mlflow_run_id)


def test_a_model_that_passes_is_registered_with_its_lineage_and_goes_into_production(make_run, config, tmp_path):
    base = make_run("base", 4.5)
    version = promoted(make_run("aligned", 4.4, base), config)
    found = ModelRegistry(config).production()
    assert found == version
    assert found.number == 1
    assert found.metrics["eval/validation/loss"] == 4.4
    stages = json.loads(found.tags["ultrathink.stages"])
    assert [stage["name"] for stage in stages] == ["base", "aligned"]
    assert [stage["mlflow_run_id"] for stage in stages] == [base.record().mlflow_run_id, found.run_id]
    assert found.tags["ultrathink.data_fingerprint"] == "f" * 32
    assert len(found.tags["ultrathink.config_sha256"]) == 64
    assert found.tags["ultrathink.commit"] == (base.record().commit or "unknown")
    from mlflow import MlflowClient

    uri = config.logging.mlflow_tracking_uri
    client = MlflowClient(uri, uri)
    assert client.get_model_version_download_uri("ultrathink", "1").endswith("/final_model")
    assert {file.path for file in client.list_artifacts(found.run_id, "final_model")} >= {
        "final_model/model.safetensors"
    }


def test_a_model_that_does_not_pass_is_not_registered(make_run, config):
    promoted(make_run("good", 4.0), config)
    worse = make_run("worse", 4.2)
    with pytest.raises(GateError, match=r"0\.2 worse than the 4 of version 1 in production"):
        promoted(worse, config)
    assert ModelRegistry(config).production().number == 1
    with pytest.raises(RegistryError):
        ModelRegistry(config).version(2)
    assert json.loads(worse.gates_file.read_text())["verdicts"][0]["production"] == 4.0


def test_the_alias_moves_to_the_next_and_back_again(make_run, config, tmp_path, capsys):
    runs = [make_run(name, loss) for name, loss in (("one", 4.0), ("second", 3.9), ("the third", 3.8))]
    for run in runs:
        command.main([str(run.path)])
    registry = ModelRegistry(config)
    assert registry.production().number == 3
    flags = ["--config", str(runs[0].config_file)]
    for expected in (2, 1):
        rollback.main(flags)
        assert registry.production().number == expected
    with pytest.raises(RegistryError, match="version 1, the first one that was ever there"):
        rollback.main(flags)
    command.main(["--version", "3", *flags])
    assert registry.production().number == 3
    rollback.main(flags)
    assert registry.production().number == 1
    output = capsys.readouterr().out
    assert "Version 3 of ultrathink is in production." in output
    assert "Version 1 of ultrathink is in production again, in place of version 3." in output


def test_models_of_another_name_have_a_production_of_their_own(make_run, config):
    promoted(make_run("one", 4.5), config)
    other = override_config(config, ["promotion.registered_model=other"])
    assert ModelRegistry(other).production() is None
    assert promoted(make_run("two", 4.6), other).number == 1
    assert ModelRegistry(config).production().metrics["eval/validation/loss"] == 4.5


def test_the_same_model_is_registered_once(make_run, config):
    run = make_run("again", 4.0)
    assert promoted(run, config).number == promoted(run, config).number == 1
    with pytest.raises(RegistryError, match="the first one"):
        ModelRegistry(config).rollback()


def test_a_store_that_cannot_be_asked_lets_nothing_through(make_run, config, monkeypatch):
    run = make_run("offline", 4.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = override_config(config, ["logging.mlflow_tracking_uri=http://user:secret@127.0.0.1:9"])
    with pytest.raises(RegistryError) as refusal:
        judge_run(run, down)
    assert "secret" not in str(refusal.value)
    with pytest.raises(RegistryError, match="no version in production"):
        ModelRegistry(config).rollback()


def test_a_workflows_folder_stands_for_its_last_stage(make_run, config, tmp_path):
    make_run("base", 4.5)
    last = make_run("last", 4.4)
    assert find_run(tmp_path).path == last.path
    assert find_run(last.path).path == last.path
    with pytest.raises(ConfigError, match="holds no run"):
        find_run(tmp_path / "nowhere")
    last.evaluation_file.unlink()
    with pytest.raises(ConfigError, match=r"no evaluation\.json"):
        judge_run(last, config)


@pytest.mark.parametrize("arguments", [[], ["folder", "--version", "1"]])
def test_promote_takes_a_run_or_a_version(arguments):
    with pytest.raises(ConfigError, match="either the folder of a run or --version"):
        command.main(arguments)
