"""A small multimodal config, and batches of media for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.media.counts import frame_tokens, image_tokens

# An image is 9 tokens; a second of sound 7.
MULTIMODAL = (
    "advanced.enable_multimodal=true",
    "multimodal.image_size=12",
    "multimodal.patch_size=4",
    "multimodal.image_hidden_size=16",
    "multimodal.image_layers=2",
    "multimodal.image_heads=2",
    "multimodal.mel_bins=6",
    "multimodal.max_audio_seconds=2",
    "multimodal.audio_stack=3",
    "multimodal.audio_hidden_size=12",
    "multimodal.audio_layers=2",
    "multimodal.audio_heads=2",
)

MakeMedia = Callable[..., MediaBatch]


@pytest.fixture
def media_model(small_model):
    """`media_model("advanced.enable_moe=true", …)`: a small model with encoders."""
    return lambda *overrides: small_model(*MULTIMODAL, *overrides)


@pytest.fixture
def media_config(small_config):
    return lambda *overrides: small_config(*MULTIMODAL, *overrides)


def place(slots: Tensor, row: int, column: int, first: int, count: int) -> None:
    slots[row, column : column + count] = torch.arange(first, first + count)


@pytest.fixture
def some_media() -> MakeMedia:
    """`some_media(config, seq, seed=0)`: two images and two clips over three rows; the second row has none."""

    def make(config: Config, seq: int, seed: int = 0) -> MediaBatch:
        generator = torch.Generator().manual_seed(seed)
        options, patches = config.multimodal, image_tokens(config.multimodal)
        frames = torch.tensor([31, 18])
        first_clip, second_clip = (frame_tokens(options, int(count)) for count in frames)
        image_slots, audio_slots = torch.full((3, seq), -1), torch.full((3, seq), -1)
        place(image_slots, 0, 2, 0, patches)
        place(image_slots, 2, 20, patches, patches)
        place(audio_slots, 0, 14, 0, first_clip)
        place(audio_slots, 2, 5, first_clip, second_clip)
        return MediaBatch(
            images=torch.randn(2, 3, options.image_size, options.image_size, generator=generator),
            audio=torch.randn(2, options.mel_bins, 31, generator=generator),
            audio_frames=frames,
            image_slots=image_slots,
            audio_slots=audio_slots,
        )

    return make
