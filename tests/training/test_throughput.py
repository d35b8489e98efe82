import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.config import override_config
from ultrathink_model.models.transformer import build_model
from ultrathink_model.training.throughput import Throughput, flops_per_token, measured_peak


@pytest.mark.parametrize("overrides", [[], ["model.num_kv_heads=4", "model.tie_embeddings=false"]])
def test_flops_are_those_of_the_dense_decoder(base_config, overrides):
    config = override_config(base_config, ["model.use_flash_attention=false", *overrides])
    model = build_model(config)
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss_sum.backward()
    attention = 3 * 2 * 2 * 32 * 32 * 2  # forward and backward of two products over all positions, in both layers
    # The chunked loss adds up its weight's gradient by `addmm_`, which the counter does not know.
    head = 2 * 300 * 32
    counted = counter.get_total_flops() / ids.numel() + head
    # Ours counts the half of attention's products that causality leaves; the formula computes all of them.
    assert flops_per_token(config) == pytest.approx(counted - attention / 2, rel=1e-6)


def test_experts_count_by_what_a_token_meets_and_depth_by_its_budget(base_config):
    dense = flops_per_token(base_config)
    mixture = flops_per_token(override_config(base_config, ["advanced.enable_moe=true"]))
    routers = 6 * 2 * 32 * 8
    assert mixture == pytest.approx(dense + routers)
    half = flops_per_token(override_config(base_config, ["advanced.enable_dre=true", "dre.compute_budget=0.5"]))
    assert half < dense


def test_utilisation_is_the_share_of_the_peak():
    assert Throughput(flops_per_token=2e6, peak=1e9).utilisation(100.0) == pytest.approx(0.2)


def test_the_measured_peak_is_a_rate_that_a_processor_can_have():
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e14


def test_every_measured_line_says_the_utilisation(train_tiny):
    _, rows = train_tiny("training.max_steps=2")
    assert all(0 < row["train/mfu"] < 2 for row in rows)
