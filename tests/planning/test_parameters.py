"""The count is that of the model that is really built, on the meta device."""

import pytest
import torch

from ultrathink_model.config import load_config, override_config
from ultrathink_model.config.profiles import PROFILES, profile_path
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.planning.parameters import count_parameters, frozen_parameters

FEATURES = [
    [],
    ["model.tie_embeddings=false"],
    ["advanced.enable_moe=true"],
    ["advanced.enable_moe=true", "moe.layer_frequency=1", "moe.expert_hidden_size=96"],
    ["advanced.enable_dre=true"],
    ["advanced.enable_constitutional=true"],
    ["advanced.enable_moe=true", "advanced.enable_dre=true", "advanced.enable_constitutional=true"],
    ["advanced.enable_multimodal=true"],
    ["advanced.enable_multimodal=true", "multimodal.image_architecture=clip", "multimodal.audio_stack=5"],
]


def built(config):
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("overrides", FEATURES, ids=lambda overrides: " ".join(overrides) or "dense")
def test_every_parameter_is_counted_once(profile, overrides):
    config = load_config(profile_path(profile), overrides)
    model = built(config)
    count = count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    named = dict(model.named_parameters())
    assert count.parts["embedding"] == named["embedding.weight"].numel()
    assert count.experts == sum(p.numel() for name, p in named.items() if name.endswith((".gate_up", ".down")))


def test_of_the_experts_only_the_chosen_ones_are_active():
    config = load_config(profile_path("tiny"), ["advanced.enable_moe=true"])
    count = count_parameters(config)
    every = count_parameters(override_config(config, [f"moe.moe_top_k={config.moe.num_experts}", WIDTH]))
    assert every.active == every.total
    assert count.active == count.total - count.experts * (1 - config.moe.moe_top_k / config.moe.num_experts)


WIDTH = "moe.expert_hidden_size=352"


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_parts_of_media_are_those_of_the_model(frozen):
    config = load_config(profile_path("tiny"), [*FEATURES[-1], f"multimodal.freeze_encoders={frozen}"])
    encoder = built(config).media_encoder
    parts = {
        "image encoder": encoder.image_encoder,
        "image projection": encoder.image_projector,
        "audio encoder": encoder.audio_encoder,
        "audio projection": encoder.audio_projector,
    }
    count = count_parameters(config)
    assert {name: count.parts[name] for name in parts} == {
        name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()
    }
    assert frozen_parameters(config) == sum(p.numel() for p in encoder.parameters() if not p.requires_grad)
