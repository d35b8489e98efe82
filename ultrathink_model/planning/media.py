"""The work and the memory of images and sound, on the way into the decoder."""

import math

from ultrathink_model.config import Config
from ultrathink_model.planning.compute import TRAINING_PASSES

FP32, HALF = 4, 2
# The audio encoder has a state for every second frame of a hundredth of a second.
STATES_PER_SECOND = 50


def image_flops(config: Config) -> float:
    """Matrix products of one image through its encoder and its projection."""
    media, hidden = config.multimodal, config.model.hidden_size
    patches, width = media.image_grid**2, media.image_hidden_size
    states = patches + (media.image_architecture == "clip")
    cut = 2 * patches * 3 * media.patch_size**2 * width
    blocks = media.image_layers * _encoder_flops(states, width, media.image_inner_size)
    return cut + blocks + 2 * patches * hidden * (width + hidden)


def sound_flops(config: Config) -> float:
    """Matrix products of a sound of `max_audio_seconds` through its encoder and its projection."""
    media, hidden = config.multimodal, config.model.hidden_size
    width, tokens = media.audio_hidden_size, media.longest_audio_tokens
    states = math.ceil(media.max_audio_seconds * STATES_PER_SECOND)
    convolutions = 2 * 3 * width * states * (2 * media.mel_bins + width)
    blocks = media.audio_layers * _encoder_flops(states, width, media.audio_inner_size)
    return convolutions + blocks + 2 * tokens * hidden * (media.audio_stack * width + hidden)


def media_flops_per_token(config: Config) -> float:
    """Training's work for one token of a sequence that is full of images; 0 without encoders.

    The encoders' part of the backward pass is left out where they are frozen, though not the projection's.
    """
    if not config.advanced.enable_multimodal:
        return 0.0
    media, hidden = config.multimodal, config.model.hidden_size
    patches = media.image_grid**2
    projection = 2 * patches * hidden * (media.image_hidden_size + hidden)
    encoder = image_flops(config) - projection
    recomputes = config.model.gradient_checkpointing and config.model.gradient_checkpointing_mode == "whole"
    passes = 1 if media.freeze_encoders else TRAINING_PASSES + recomputes
    return (passes * encoder + TRAINING_PASSES * projection) / patches


def _encoder_flops(states: int, width: int, inner: int) -> float:
    """One block of an encoder, in which every state looks at every other."""
    return states * (8 * width * width + 4 * width * states + 4 * width * inner)


def media_activations(config: Config) -> float:
    """Bytes that a micro-batch of sequences full of images keeps of them for the backward pass; 0 without encoders."""
    if not config.advanced.enable_multimodal:
        return 0.0
    media, tokens = config.multimodal, config.training.batch_size * config.model.max_seq_length
    product = HALF if config.training.use_amp else FP32
    width = media.image_hidden_size
    projection = (width + 2 * config.model.hidden_size) * product + width * FP32
    if media.freeze_encoders:
        return tokens * projection
    # Norms, residual, attention and feed-forward, as of the decoder's blocks.
    block = 2 * width * product + 2 * width * FP32 + 7 * width * product + 2 * media.image_inner_size * product
    if config.model.gradient_checkpointing and config.model.gradient_checkpointing_mode == "whole":
        block = width * FP32
    return tokens * (projection + 3 * media.patch_size**2 * FP32 + media.image_layers * block)
