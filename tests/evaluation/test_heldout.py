import math

import numpy as np
import pytest
import torch

from ultrathink_model.data.loader import ValidationLoader
from ultrathink_model.evaluation.heldout import HeldOutScores, ratio_stderr, score_split
from ultrathink_model.models.transformer import build_model


def scores_of(bins):
    bins = np.array(bins, dtype=float)
    return HeldOutScores(np.ones(len(bins)), bins[:, :, 0].sum(1), bins)


def test_standard_error_of_equal_rows_is_that_of_their_mean():
    values = np.random.default_rng(0).normal(size=50)
    found = ratio_stderr(values * 8, np.full(50, 8.0))
    assert found == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert math.isnan(ratio_stderr(np.ones(1), np.ones(1)))


def test_standard_error_covers_the_true_mean_as_often_as_it_says():
    random, hits = np.random.default_rng(1), 0
    for _ in range(400):
        counts = random.integers(5, 40, size=60).astype(float)
        # The tokens of a row share most of their noise, as those of a text do.
        sums = counts * (3.0 + random.normal(size=60)) + random.normal(size=60) * np.sqrt(counts)
        hits += abs(sums.sum() / counts.sum() - 3.0) < 1.96 * ratio_stderr(sums, counts)
    # 95 % of 400 with a standard error of 1.1 %, and 60 rows are not infinitely many.
    assert 0.91 < hits / 400 < 0.98


def test_calibration_error_weighs_each_bin_by_its_tokens():
    # Bin 1: 10 tokens at confidence 0.3, 5 right; bin 2: 30 tokens at 0.9, 27 right.
    rows = [[[5, 1.5, 2], [15, 13.5, 14]], [[5, 1.5, 3], [15, 13.5, 13]]]
    found = scores_of(rows)
    assert found.calibration()["eval/validation/calibration_error"] == pytest.approx(0.2 * 10 / 40)
    assert found.calibration()["eval/validation/accuracy"] == pytest.approx(32 / 40)
    assert [(round(b.confidence, 6), round(b.accuracy, 6), b.tokens) for b in found.reliability()] == [
        (0.3, 0.5, 10),
        (0.9, 0.9, 30),
    ]


def test_a_model_that_is_sure_of_nothing_is_calibrated_at_one_in_the_vocabulary(text_config, manifest):
    model = build_model(text_config).eval()
    torch.nn.init.zeros_(model.embedding.weight)
    scores = score_split(model, ValidationLoader(manifest, text_config), bins=4)
    assert scores.loss.tokens == manifest.splits["validation"].tokens
    assert [bin_.tokens for bin_ in scores.reliability()] == [scores.loss.tokens]
    assert scores.reliability()[0].confidence == pytest.approx(1 / 300)
