import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.data import Batch
from ultrathink_model.errors import ConfigError
from ultrathink_model.training.curriculum import cut_rows, sequence_length
from ultrathink_model.training.trainer import Trainer


def test_length_doubles_at_even_distances(base_config):
    config = override_config(base_config, ["training.first_seq_length=8", "training.seq_length_steps=10"])
    assert [sequence_length(config, step) for step in range(12)] == [8] * 5 + [16] * 5 + [32] * 2
    assert sequence_length(base_config, 0) == 32


def test_cut_rows_hold_the_same_tokens_in_their_order():
    ids = torch.arange(16).view(2, 8)
    batch = Batch(ids, ids + 1, ids // 5, None, num_tokens=16)
    cut = cut_rows(batch, 4)
    assert cut.input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert torch.equal(cut.labels, cut.input_ids + 1)
    assert torch.equal(cut.document_ids, cut.input_ids // 5)
    assert cut.source_groups is None
    assert cut.num_tokens == 16
    assert cut_rows(batch, 8) is batch


def test_a_run_sees_short_rows_first_and_whole_ones_in_validation(train_tiny, monkeypatch):
    shapes = []
    forward = Trainer.forward

    def noted(self, batch):
        shapes.append((tuple(batch.input_ids.shape), torch.is_grad_enabled()))
        return forward(self, batch)

    monkeypatch.setattr(Trainer, "forward", noted)
    _, rows = train_tiny("training.first_seq_length=8", "training.seq_length_steps=4")
    assert [shape for shape, learns in shapes if learns] == [(16, 8)] * 2 + [(8, 16)] * 2 + [(4, 32)] * 2
    assert {shape[1] for shape, learns in shapes if not learns} == {32}
    assert len({row["tokens"] - row["step"] * rows[0]["tokens"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["training.first_seq_length=12", "training.seq_length_steps=4"], "does not reach.*take 16, 8, 4"),
        (["training.first_seq_length=32", "training.seq_length_steps=4"], "by doubling"),
        (["training.first_seq_length=16"], "go together"),
        (["training.seq_length_steps=4"], "go together"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(base_config, override, message):
    with pytest.raises(ConfigError, match=message):
        override_config(base_config, override)
