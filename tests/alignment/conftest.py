"""Tiny models that have learnt a little, and the data they learnt from; made once for all tests of this folder."""

from pathlib import Path

import pytest
from alignment_cases import ROUTED, VALUES, trained

from ultrathink_model.config import Config, make_config, override_config
from ultrathink_model.data import DataManifest, prepare_data
from ultrathink_model.models.hf import save_model


@pytest.fixture(scope="session")
def base_config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("alignment")
    return make_config(VALUES, [f"data.cache_dir={folder / 'data'}", f"output.output_dir={folder / 'none'}"])


@pytest.fixture(scope="session")
def manifest(base_config) -> DataManifest:
    return prepare_data(base_config)


@pytest.fixture(scope="session")
def dense_folder(base_config, manifest, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "final_model"
    save_model(trained(base_config, manifest, 60), manifest.tokenizer_folder, folder)
    return folder


@pytest.fixture(scope="session")
def routed_folder(base_config, manifest, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("routed") / "final_model"
    save_model(trained(override_config(base_config, ROUTED), manifest, 60), manifest.tokenizer_folder, folder)
    return folder


@pytest.fixture
def config(base_config, tmp_path) -> Config:
    return override_config(base_config, ["advanced.enable_rlhf=true", f"output.output_dir={tmp_path / 'aligned'}"])
