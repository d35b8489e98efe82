"""The parameters of a model, counted by part."""

from dataclasses import dataclass

from ultrathink_model.config import Config

# Numbers that a depth router holds beside its matrix: the strength of each further pass.
DEPTH_STRENGTHS = 2


@dataclass(frozen=True)
class Parameters:
    """Parameters by part, and how many of them one token passes through.

    Attributes:
        parts: Number of parameters by the name of the part; parts that a model does not have are left out.
        active: Those that take part in one token's computation: of the experts, the chosen ones alone. The encoders of
            images and sound are counted, too, though text passes them by.
        experts: Those of all experts.
    """

    parts: dict[str, int]
    active: int
    experts: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def count_parameters(config: Config) -> Parameters:
    """Counts exactly what `build_model` makes."""
    model, moe = config.model, config.moe
    hidden, layers = model.hidden_size, model.num_layers
    mixtures, routed = num_mixtures(config), num_routed(config)
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    attention = hidden * (queries + 2 * keys) + queries * hidden
    expert = 3 * hidden * expert_width(config)
    experts = mixtures * moe.num_experts * expert
    categories = len(config.advanced.harm_categories)
    parts = {
        "embedding": model.vocab_size * hidden,
        "output": 0 if model.tie_embeddings else model.vocab_size * hidden,
        "attention": layers * attention,
        "feed-forward": (layers - mixtures) * 3 * hidden * model.feed_forward_size,
        "experts": experts,
        "expert routers": mixtures * hidden * moe.num_experts,
        "depth routers": routed * (hidden + DEPTH_STRENGTHS),
        "norms": layers * (2 * hidden + 2 * model.head_size) + hidden,
        "harm head": categories * (hidden + 1),
        **media_parameters(config),
    }
    idle = experts - mixtures * moe.moe_top_k * expert
    return Parameters({name: number for name, number in parts.items() if number}, sum(parts.values()) - idle, experts)


def media_parameters(config: Config) -> dict[str, int]:
    """The encoders of images and sound, and their projections into the decoder; empty without them."""
    if not config.advanced.enable_multimodal:
        return {}
    media, hidden = config.multimodal, config.model.hidden_size
    width, is_clip = media.image_hidden_size, media.image_architecture == "clip"
    # CLIP has a class token and its place, SigLIP a bias on the patches; each has one norm beside the blocks.
    image = 3 * media.patch_size**2 * width + media.image_grid**2 * width + (2 if is_clip else 1) * width + 2 * width
    image += media.image_layers * _encoder_block(width, media.image_inner_size)
    heard = media.audio_hidden_size
    audio = (3 * media.mel_bins * heard + heard) + (3 * heard * heard + heard) + 2 * heard
    audio += media.audio_layers * _encoder_block(heard, media.audio_inner_size)
    stacked = media.audio_stack * heard
    return {
        "image encoder": image,
        "image projection": width + width * hidden + hidden * hidden,
        "audio encoder": audio,
        "audio projection": stacked + stacked * hidden + hidden * hidden,
    }


def frozen_parameters(config: Config) -> int:
    """Parameters that are not trained: they have no gradient and no optimizer state."""
    media = media_parameters(config)
    return media["image encoder"] + media["audio encoder"] if media and config.multimodal.freeze_encoders else 0


def _encoder_block(width: int, inner: int) -> int:
    """Two norms; queries, keys and values, with biases on all but the keys; the output; the feed-forward."""
    return 4 * width + (3 * width * width + 2 * width) + (width * width + width) + (2 * width * inner + inner + width)


def num_mixtures(config: Config) -> int:
    """Blocks that hold a mixture of experts."""
    return config.model.num_layers // config.moe.layer_frequency if config.advanced.enable_moe else 0


def num_routed(config: Config) -> int:
    """Blocks that are routed in depth."""
    routed = sum(config.dre.routes(layer) for layer in range(config.model.num_layers))
    return routed if config.advanced.enable_dre else 0


def expert_width(config: Config) -> int:
    """Inner units of one expert."""
    return config.moe.expert_hidden_size or config.model.feed_forward_size // config.moe.moe_top_k
