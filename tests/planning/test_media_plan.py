"""The work of images and sound is what PyTorch counts, and the plan shows it."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.config import load_config, override_config
from ultrathink_model.config.profiles import profile_path
from ultrathink_model.models.transformer import build_model
from ultrathink_model.planning import make_plan
from ultrathink_model.planning.hardware import DEVICES
from ultrathink_model.planning.media import image_flops, media_activations, media_flops_per_token, sound_flops
from ultrathink_model.planning.table import describe, describe_device


@pytest.fixture(params=["clip", "siglip"])
def config(request):
    overrides = ["advanced.enable_multimodal=true", f"multimodal.image_architecture={request.param}"]
    return load_config(profile_path("tiny"), [*overrides, "multimodal.audio_stack=5"])


@torch.no_grad()
def test_work_is_what_pytorch_counts(config):
    encoder = build_model(config).media_encoder.eval()
    media = config.multimodal
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as images:
        encoder.image_projector(encoder.image_encoder(torch.zeros(1, 3, media.image_size, media.image_size)))
    frames = round(100 * media.max_audio_seconds)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as sounds:
        states, inside = encoder.audio_encoder(torch.zeros(1, media.mel_bins, frames), torch.tensor([frames]))
        encoder.audio_projector(encoder._stacked(states, inside)[0])
    assert image_flops(config) == pytest.approx(images.get_total_flops())
    assert sound_flops(config) == pytest.approx(sounds.get_total_flops())


def test_frozen_encoders_cost_less_work_and_memory(config):
    frozen = override_config(config, ["multimodal.freeze_encoders=true"])
    assert media_flops_per_token(frozen) < media_flops_per_token(config) / 2
    assert media_activations(frozen) < media_activations(config) / 4
    assert make_plan(frozen).memory.total < make_plan(config).memory.total
    assert make_plan(frozen).checkpoint < make_plan(config).checkpoint


def test_large_plan_shows_media():
    config = load_config(profile_path("large"), ["advanced.enable_multimodal=true", "distributed.enabled=true"])
    plan, text_only = make_plan(config, 8), make_plan(override_config(config, ["advanced.enable_multimodal=false"]), 8)
    name, device = next(iter(DEVICES.items()))
    told = describe(plan) + describe_device(plan, name, device, 0.4, None)
    for words in ("image encoder", "audio projection", "an image of 224 × 224", "speed in sequences full of images"):
        assert words in told
    assert plan.memory.total > text_only.memory.total
    assert plan.image_tokens_per_second(device, 0.4) < plan.tokens_per_second(device, 0.4)
    assert plan.tokens_per_second(device, 0.4) == text_only.tokens_per_second(device, 0.4)
