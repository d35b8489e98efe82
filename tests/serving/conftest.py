"""A model of each kind in the folder of a finished run."""

import pytest

from ultrathink_model.config import override_config
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import build_model
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity


@pytest.fixture
def finished_run(tiny_config, tmp_path):
    """`finished_run("name", "advanced.enable_dre=true", …)`: the folder of a run whose model was trained for no step."""
    (tmp_path / "text.jsonl").write_text('{"text": "The state of the union."}\n' * 20, encoding="utf-8")
    data = override_config(tiny_config, [f"data.dataset={tmp_path / 'text.jsonl'}"])

    def make(name, *overrides):
        folder = RunFolder(tmp_path / "outputs" / name)
        config = override_config(data, ["model.initializer_range=0.2", *overrides])
        folder.begin(RunIdentity.of(config, name), config)
        save_model(build_model(config), prepare_data(data).tokenizer_folder, folder.final_model)
        folder.set_status("finished")
        return folder.path

    return make
