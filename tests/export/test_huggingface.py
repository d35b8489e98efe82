import json

import pytest
import torch

from ultrathink_model.errors import CheckpointError
from ultrathink_model.export import command
from ultrathink_model.export.export import export_model


def export_that_stands(folder):
    """Puts an older export in place."""
    folder.mkdir()
    (folder / "config.json").write_text("an older export")
    return folder


def assert_untouched(folder):
    assert (folder / "config.json").read_text() == "an older export"
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_export_loads_in_transformers_and_replaces_the_older_one(make_run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final_model = make_run("run")
    destination = export_that_stands(tmp_path / "export")
    assert export_model(final_model, destination) == destination
    model = AutoModelForCausalLM.from_pretrained(destination)
    tokens = AutoTokenizer.from_pretrained(destination)("The state", return_tensors="pt").input_ids
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, tokens.shape[1] + 3)
    assert "# run" in (destination / "README.md").read_text()
    assert (final_model / "README.md").read_text() != (destination / "README.md").read_text()


@pytest.mark.slow
def test_the_command_exports_in_the_formats_that_are_asked_for(make_run, tmp_path):
    command.main([str(make_run("run")), str(tmp_path / "export"), "--override", "export.formats=[gguf]"])
    assert (tmp_path / "export" / "model.safetensors").is_file()
    assert list((tmp_path / "export").rglob("*.gguf"))


def test_damaged_weights_leave_the_older_export_as_it_was(make_run, tmp_path):
    final_model = make_run("run")
    destination = export_that_stands(tmp_path / "export")
    weights = final_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        export_model(final_model, destination)
    assert_untouched(destination)


def test_model_that_computes_something_else_in_transformers_is_not_exported(make_run, tmp_path):
    final_model = make_run("run")
    destination = export_that_stands(tmp_path / "export")
    config = json.loads((final_model / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 2.0
    (final_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="logits"):
        export_model(final_model, destination)
    assert_untouched(destination)


def test_model_that_needs_this_package_is_not_exported(make_run, tmp_path):
    final_model = make_run("run")
    destination = export_that_stands(tmp_path / "export")
    (final_model / "code.py").write_text(
        "import ultrathink_model\nfrom transformers import Qwen3ForCausalLM\nclass Ours(Qwen3ForCausalLM):\n    pass\n"
    )
    config = json.loads((final_model / "config.json").read_text())
    (final_model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "code.Ours"}}))
    with pytest.raises(CheckpointError, match="ultrathink_model"):
        export_model(final_model, destination)
    assert_untouched(destination)


def test_pickles_are_not_exported(make_run, tmp_path):
    final_model = make_run("run")
    torch.save({}, final_model / "extra.bin")
    with pytest.raises(CheckpointError, match=r"extra\.bin"):
        export_model(final_model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("inside", [".", "export"])
def test_destination_within_the_model_is_refused(make_run, inside):
    final_model = make_run("run")
    with pytest.raises(CheckpointError, match="another folder"):
        export_model(final_model, final_model / inside)


def test_missing_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        export_model(tmp_path / "nowhere", tmp_path / "export")
