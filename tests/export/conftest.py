"""A run folder with a model that was trained for no step at all, but saved for real."""

import pytest

from ultrathink_model.config import override_config
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import build_model
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity
from ultrathink_model.training.result import StageResult


@pytest.fixture
def manifest(tiny_config, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "The state of the union."}\n' * 20, encoding="utf-8")
    return prepare_data(override_config(tiny_config, [f"data.dataset={tmp_path / 'text.jsonl'}"]))


@pytest.fixture
def make_run(tiny_config, manifest, tmp_path):
    """Makes the folder of a finished run and gives its `final_model/`."""

    def make(name, init_from=None, overrides=()):
        folder = RunFolder(tmp_path / name)
        config = override_config(tiny_config, [f"output.output_dir={folder.path}", *overrides])
        folder.begin(RunIdentity.of(config, name, init_from), config)
        save_model(build_model(config), manifest.tokenizer_folder, folder.final_model)
        StageResult(
            name=name,
            output_dir=str(folder.path),
            final_model=str(folder.final_model),
            steps=6,
            tokens=1234,
            metrics={},
            mlflow_run_id=None,
            data_manifest=str(manifest.path),
        ).save()
        return folder.final_model

    return make
