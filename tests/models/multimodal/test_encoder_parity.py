"""The encoders against `transformers`' own, with weights read from their folders."""

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperModel,
)

from ultrathink_model.config import make_config
from ultrathink_model.errors import CheckpointError, ConfigError
from ultrathink_model.models.multimodal.encoder_weights import take_encoders
from ultrathink_model.models.multimodal.media_encoder import MediaEncoder
from ultrathink_model.models.transformer import build_model

# Both sum the same float32 products in another order, over a few hundred terms of order 1.
PARITY = {"atol": 1e-5, "rtol": 1e-5}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "num_mel_bins": 6,
    "max_source_positions": 25,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def saved(model, folder):
    """The model with every weight away from its neutral start, written to a folder."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "embed_positions" not in name:
            weight.data.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    model.eval().save_pretrained(folder)
    return model


def encoders(image: Path | None = None, audio: Path | None = None, side: int = 12) -> MediaEncoder:
    """The encoders of a folder, beside a small one of our own."""
    small_image = {"patch_size": 4, "image_hidden_size": 6, "image_layers": 1}
    small_audio = {"audio_hidden_size": 12, "audio_layers": 1}
    values = {
        "model": {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 50, "max_seq_length": 64},
        "advanced": {"enable_multimodal": True},
        "multimodal": {"max_audio_seconds": 0.5, "image_size": side}
        | ({"image_encoder": str(image)} if image else small_image)
        | ({"audio_encoder": str(audio)} if audio else small_audio),
    }
    config = make_config(values)
    encoder = build_model(config).media_encoder
    take_encoders(encoder, config)
    return encoder.eval()


@pytest.mark.parametrize("whole", [False, True], ids=["vision model", "whole model"])
@torch.no_grad()
def test_clip_states_are_those_of_transformers(tmp_path, whole):
    if whole:
        theirs = saved(CLIPModel(CLIPConfig(vision_config=VISION)), tmp_path).vision_model
    else:
        theirs = saved(CLIPVisionModel(CLIPVisionConfig(**VISION)), tmp_path)
    images = torch.randn(3, 3, 12, 12)
    expected = theirs(pixel_values=images).last_hidden_state[:, 1:]
    found = encoders(image=tmp_path).image_encoder(images)
    torch.testing.assert_close(found, expected, **PARITY)


@torch.no_grad()
def test_siglip_states_are_those_of_transformers(tmp_path):
    theirs = saved(SiglipVisionModel(SiglipVisionConfig(**VISION)), tmp_path)
    images = torch.randn(3, 3, 12, 12)
    expected = theirs(pixel_values=images).last_hidden_state
    found = encoders(image=tmp_path).image_encoder(images)
    torch.testing.assert_close(found, expected, **PARITY)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_positions_interpolate_as_in_transformers(tmp_path, kind):
    clip = kind == "clip"
    model, config = (CLIPVisionModel, CLIPVisionConfig) if clip else (SiglipVisionModel, SiglipVisionConfig)
    theirs = saved(model(config(**VISION)), tmp_path)
    images = torch.randn(2, 3, 20, 20)
    expected = theirs(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state[:, int(clip) :]
    # At run time, and once for all where the run's images are of another size than the folder's.
    for encoder in (encoders(tmp_path), encoders(tmp_path, side=20)):
        torch.testing.assert_close(encoder.image_encoder(images), expected, **PARITY)


@torch.no_grad()
def test_whisper_states_are_those_of_transformers(tmp_path):
    theirs = saved(WhisperModel(WhisperConfig(**WHISPER)), tmp_path).encoder
    audio = torch.randn(2, 6, 50)
    expected = theirs(audio).last_hidden_state
    encoder = encoders(audio=tmp_path).audio_encoder
    found, inside = encoder(audio, torch.tensor([50, 50]))
    assert inside.all()
    torch.testing.assert_close(found, expected, **PARITY)


def test_sizes_come_from_the_folders(tmp_path):
    saved(CLIPVisionModel(CLIPVisionConfig(**VISION)), tmp_path / "clip")
    saved(WhisperModel(WhisperConfig(**WHISPER)), tmp_path / "whisper")
    values = {"image_encoder": str(tmp_path / "clip"), "audio_encoder": str(tmp_path / "whisper"), "image_size": 24}
    media = make_config({"multimodal": values}).multimodal
    assert (media.image_architecture, media.image_hidden_size, media.image_layers) == ("clip", 16, 3)
    assert (media.patch_size, media.image_intermediate_size, media.image_activation) == (4, 40, "quick_gelu")
    assert media.image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert (media.audio_hidden_size, media.audio_layers, media.mel_bins) == (16, 3, 6)
    assert media.max_audio_seconds == 0.5
    # A resolved config stays readable where the folders are gone, and comes out the same.
    again = make_config({"multimodal": media.model_dump(mode="json")}).multimodal
    assert again == media
    gone = media.model_dump(mode="json") | {"image_encoder": str(tmp_path / "gone")}
    assert make_config({"multimodal": gone}).multimodal.image_layers == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_encoder": "nowhere"}, "nowhere holds no config.json"),
        ({"image_encoder": "{whisper}"}, "model of type 'whisper'; take a CLIP or a SigLIP"),
        ({"audio_encoder": "{clip}"}, "model of type 'clip_vision_model'; take a Whisper"),
        ({"image_encoder": "{clip}", "image_layers": 5}, "image_layers=5 contradicts .* whose image_layers is 3"),
        ({"audio_encoder": "{whisper}", "max_audio_seconds": 3}, "max_audio_seconds=3 is more than .* lower it to 0.5"),
        ({"image_size": 30}, "image_size=30 is not a multiple of patch_size=14; take image_size=28"),
        ({"audio_heads": 5}, "audio_hidden_size=384 is not a multiple of audio_heads=5"),
        ({"image_std": [0.5, 0, 0.5]}, "must be more than 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, values, message):
    saved(CLIPVisionModel(CLIPVisionConfig(**VISION)), tmp_path / "clip")
    saved(WhisperModel(WhisperConfig(**WHISPER)), tmp_path / "whisper")
    folders = {"clip": tmp_path / "clip", "whisper": tmp_path / "whisper"}
    values = {key: value.format(**folders) if isinstance(value, str) else value for key, value in values.items()}
    with pytest.raises(ConfigError, match=message):
        make_config({"multimodal": values})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.max_seq_length=256"], "makes 16² = 256 tokens an image, and model.max_seq_length=256 must hold text"),
        (["multimodal.max_audio_seconds=90"], "makes 1125 tokens a sound"),
    ],
)
def test_a_medium_leaves_room_for_text(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_config({}, ["advanced.enable_multimodal=true", *overrides])


def test_a_folder_that_is_gone_is_refused_when_its_weights_are_wanted(tmp_path):
    saved(CLIPVisionModel(CLIPVisionConfig(**VISION)), tmp_path / "clip")
    media = make_config({"multimodal": {"image_encoder": str(tmp_path / "clip"), "image_size": 12}}).multimodal
    values = media.model_dump(mode="json") | {"image_encoder": str(tmp_path / "gone")}
    config = make_config({"multimodal": values}, ["advanced.enable_multimodal=true", "model.num_layers=1"])
    with pytest.raises(CheckpointError, match="gone does not exist"):
        take_encoders(build_model(config).media_encoder, config)
