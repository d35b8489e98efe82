"""The loss that int8 weights cost: measured on held-out tokens, kept in the record, and told on the card."""

import json

import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.config.export import ExportConfig
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.export.export import ExportRecord, _held_out_rows, export_model
from ultrathink_model.models.hf import load_model


@pytest.fixture
def manifest(tiny_config, tmp_path):
    """Data whose held-out text has several sequences."""
    rows = [json.dumps({"text": f"The state of union number {n} is strong. " * 4}) for n in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return prepare_data(override_config(tiny_config, [f"data.dataset={tmp_path / 'text.jsonl'}"]))


@pytest.fixture
def final_model(make_run):
    return make_run("run", overrides=["model.max_seq_length=8", "model.initializer_range=0.2"])


def rows_for(final_model, config, loss_tokens):
    settings = ExportConfig(formats=["gguf_int8"], loss_tokens=loss_tokens)
    return _held_out_rows(final_model, config.model_copy(update={"export": settings}))


def test_loss_is_measured_on_whole_sequences_of_as_many_tokens_as_asked(final_model):
    config = load_model(final_model).config
    assert rows_for(final_model, config, 8).shape == (1, 9)
    assert rows_for(final_model, config, 17).shape == (2, 9)
    # At least one, and no more than there are.
    assert rows_for(final_model, config, 1).shape == (1, 9)
    everything = rows_for(final_model, config, 10**9)
    assert len(everything) > 2
    assert rows_for(final_model, config, 17).equal(everything[:2])
    assert _held_out_rows(final_model, config) is None, "no format asks for a loss"


@pytest.mark.slow
@torch.no_grad()
def test_an_int8_file_stands_with_its_loss_in_the_record_and_on_the_card(final_model, tmp_path):
    settings = ExportConfig(formats=["gguf_int8"], loss_tokens=16)
    folder = export_model(final_model, tmp_path / "export", settings)
    record = ExportRecord.load(folder / "export.json")
    model = load_model(final_model).eval()
    rows = rows_for(final_model, model.config, 16)
    loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    assert record.loss == pytest.approx(float(loss), rel=1e-5)
    assert record.loss_tokens == 16
    found = record.files[0].loss
    assert 0 < abs(found - record.loss) < 0.05
    card = (folder / "README.md").read_text()
    assert "16 held-out tokens" in card
    assert f"{found:.5f} ({found - record.loss:+.5f})" in card
