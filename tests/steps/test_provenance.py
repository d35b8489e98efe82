"""What becomes of the run in a stage's folder when its step is run again."""

import pytest

from steps.provenance import note_result, settle_resume
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity
from ultrathink_model.training.result import RESULT_FILE


@pytest.fixture
def begun(tiny_config):
    """A run that was ordered by code `one` and began."""
    assert settle_resume(tiny_config, "one").training.resume == "auto"
    folder = RunFolder(tiny_config.output.output_dir)
    folder.begin(RunIdentity.of(tiny_config, "stage"), tiny_config)
    return folder


def finish(folder):
    folder.final_model.mkdir()
    (folder.final_model / "model.safetensors").write_bytes(b"weights")
    (folder.path / RESULT_FILE).write_text("{}", encoding="utf-8")
    folder.set_status("finished")
    note_result(folder.path)


@pytest.mark.parametrize("code", ["one", "two"])
def test_a_run_that_was_cut_short_goes_on_whatever_the_code(code, begun, tiny_config):
    assert settle_resume(tiny_config, code).training.resume == "auto"


def test_a_finished_run_of_the_same_code_stands(begun, tiny_config):
    finish(begun)
    assert settle_resume(tiny_config, "one").training.resume == "auto"
    assert (begun.path / RESULT_FILE).exists()


def test_a_finished_run_of_other_code_is_made_anew(begun, tiny_config):
    finish(begun)
    assert settle_resume(tiny_config, "two").training.resume == "never"


def test_a_run_made_anew_goes_on_after_it_was_cut_short(begun, tiny_config):
    finish(begun)
    settle_resume(tiny_config, "two")
    begun.begin(RunIdentity.of(tiny_config, "stage"), tiny_config, fresh=True)
    assert settle_resume(tiny_config, "two").training.resume == "auto"


def test_a_run_ordered_anew_that_never_began_is_ordered_again(begun, tiny_config):
    finish(begun)
    settle_resume(tiny_config, "two")
    assert settle_resume(tiny_config, "two").training.resume == "never"


def test_a_touched_model_is_written_again_from_the_checkpoint(begun, tiny_config):
    finish(begun)
    (begun.final_model / "model.safetensors").write_bytes(b"others")
    assert settle_resume(tiny_config, "one").training.resume == "auto"
    assert not (begun.path / RESULT_FILE).exists()


def test_a_run_of_unknown_origin_is_made_anew(tiny_config):
    folder = RunFolder(tiny_config.output.output_dir)
    folder.begin(RunIdentity.of(tiny_config, "stage"), tiny_config)
    assert settle_resume(tiny_config, "one").training.resume == "never"
