"""What the shipped profiles promise: their sizes, and what experts add to weights and to compute."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.config import Config, load_config
from ultrathink_model.config.profiles import profile_path
from ultrathink_model.models.transformer import Transformer

SIZES = {"small": 100e6, "medium": 2e9, "large": 10e9}
SHAPES = {"small": (512, 6), "medium": (2048, 24), "large": (4096, 32)}
MIXTURE = "advanced.enable_moe=true"


def profile(name: str, *overrides: str) -> Config:
    # The plain formula of attention is one that the counter knows on every device.
    return load_config(profile_path(name), ["model.use_flash_attention=false", *overrides])


def weights(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


@torch.no_grad()
def operations(config: Config) -> int:
    """Operations of a forward pass over one sequence, by tensors that have sizes and no memory."""
    with FakeTensorMode():
        model, tokens = Transformer(config).eval(), torch.zeros(1, config.model.max_seq_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SIZES)
def test_profile_has_the_guides_shape_and_size(name):
    config = profile(name)
    assert (config.model.hidden_size, config.model.num_layers) == SHAPES[name]
    assert config.model.tie_embeddings
    assert weights(config) == pytest.approx(SIZES[name], rel=0.05)


@pytest.mark.parametrize("name", SIZES)
def test_experts_give_five_to_ten_times_the_weights_for_hardly_more_compute(name):
    dense, mixture = profile(name), profile(name, MIXTURE)
    assert 5 <= weights(mixture) / weights(dense) <= 10
    assert 1 < operations(mixture) / operations(dense) <= 1.15
