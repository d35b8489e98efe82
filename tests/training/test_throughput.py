import pytest
import torch

from ultrathink_model.training.throughput import Throughput, measured_peak


def test_utilisation_is_the_share_of_the_peak():
    assert Throughput(flops_per_token=2e6, peak=1e9).utilisation(100.0) == pytest.approx(0.2)


def test_the_measured_peak_is_a_rate_that_a_processor_can_have():
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e14


def test_every_measured_line_says_the_utilisation(train_tiny):
    _, rows = train_tiny("training.max_steps=2")
    assert all(0 < row["train/mfu"] < 2 for row in rows)
