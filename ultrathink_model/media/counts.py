"""How many tokens of a sequence an image or a sound takes."""

from ultrathink_model.config.multimodal import MultimodalConfig

FRAMES_PER_SECOND = 100
# The audio encoder's second convolution leaves a state for every second frame.
FRAMES_PER_STATE = 2


def image_tokens(config: MultimodalConfig) -> int:
    """Tokens of one image: one a patch."""
    return config.image_grid**2


def audio_frames(config: MultimodalConfig, samples: int) -> int:
    """Frames of a sound of so many samples: one every hundredth of a second, at least one."""
    return max(1, samples // (config.audio_sample_rate // FRAMES_PER_SECOND))


def audio_tokens(config: MultimodalConfig, samples: int) -> int:
    """Tokens of a sound of so many samples at `audio_sample_rate`, at least one."""
    return frame_tokens(config, audio_frames(config, samples))


def frame_tokens(config: MultimodalConfig, frames: int) -> int:
    """Tokens of a sound of so many frames."""
    states = -(-frames // FRAMES_PER_STATE)
    return -(-states // config.audio_stack)
