import numpy as np
import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.evaluation.context import context_metrics, loss_by_context
from ultrathink_model.evaluation.evaluate import evaluate
from ultrathink_model.models.transformer import build_model


def test_every_token_of_the_split_is_in_one_bin(text_config, manifest):
    model = build_model(text_config).eval()
    found = loss_by_context(model, manifest, 48, 10_000, batch_size=4)
    assert [(bin_.first, bin_.last) for bin_ in found] == [(0, 15), (16, 31), (32, 47)]
    assert sum(bin_.tokens for bin_ in found) == manifest.splits["validation"].tokens
    assert all(np.isfinite([bin_.loss, bin_.stderr]).all() for bin_ in found)


def test_windows_of_a_whole_split_give_its_loss(text_config, manifest):
    """Where each window is a row of the split, the bins' mean is the validation loss."""
    model = build_model(text_config).eval()
    single = override_config(text_config, ["data.packing=best_fit"])
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    exact = evaluate(model, tokenizer, prepare_data(single), single).metrics["eval/validation/loss"]
    bins = loss_by_context(model, manifest, 32, 10_000, batch_size=4)
    mean = sum(bin_.loss * bin_.tokens for bin_ in bins) / sum(bin_.tokens for bin_ in bins)
    # Best fit cuts a long document at other places than windows do; a fresh model's loss hardly knows.
    assert mean == pytest.approx(exact, rel=2e-3)


def test_a_model_without_use_for_context_loses_the_same_everywhere(text_config, manifest):
    model = build_model(text_config).eval()
    torch.nn.init.zeros_(model.embedding.weight)
    found = loss_by_context(model, manifest, 32, 7, batch_size=2)
    metrics = context_metrics(found)
    assert set(metrics) >= {"eval/context/loss_from_0", "eval/context/loss_from_16_stderr"}
    assert [bin_.loss for bin_ in found] == pytest.approx([np.log(300)] * 2, abs=1e-5)
    assert [bin_.stderr for bin_ in found] == pytest.approx([0.0] * 2, abs=1e-5)
