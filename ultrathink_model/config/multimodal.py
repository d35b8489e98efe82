"""The section `multimodal`: how images and sound are cut into tokens, and the encoders that read them."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from ultrathink_model.config.encoder_folder import with_audio_encoder, with_image_encoder
from ultrathink_model.config.section import Section

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


class MultimodalConfig(Section):
    """Images and sound beside text. A key that is null takes its default, or what the encoder's folder says."""

    image_size: int = Field(224, ge=1, description="Side of the square image in pixels; a multiple of `patch_size`.")
    patch_size: int = Field(14, ge=1, description="Side of one image patch in pixels; each patch is one token.")
    audio_sample_rate: int = Field(
        16_000, ge=4_000, multiple_of=100, description="Samples of sound per second; a frame comes every hundredth."
    )
    mel_bins: int = Field(80, ge=1, description="Mel frequencies of a frame of sound.")
    max_audio_seconds: float = Field(30.0, gt=0, description="Seconds of the longest sound that is taken.")
    audio_stack: int = Field(
        4, ge=1, description="States of the audio encoder, 20 ms each, that are joined into one token."
    )
    image_encoder: str | None = Field(
        None,
        description="Local Hugging Face folder of a CLIP or SigLIP model whose image encoder is taken; null draws one at random.",
    )
    audio_encoder: str | None = Field(
        None,
        description="Local Hugging Face folder of a Whisper model whose audio encoder is taken; null draws one at random.",
    )
    freeze_encoders: bool = Field(
        False, description="Train only the projections into the decoder (and the decoder), not the encoders."
    )
    image_architecture: Literal["siglip", "clip"] = Field(
        "siglip",
        description="Of the image encoder: `clip` has a class token and a norm before its blocks, `siglip` a norm behind them.",
    )
    image_hidden_size: int = Field(384, ge=1, description="Width of the image encoder.")
    image_layers: int = Field(12, ge=1, description="Blocks of the image encoder.")
    image_heads: int = Field(6, ge=1, description="Attention heads of the image encoder.")
    image_intermediate_size: int | None = Field(
        None, ge=1, description="Inner width of the image encoder's feed-forward; null takes 4 × `image_hidden_size`."
    )
    image_activation: Activation = Field("gelu_tanh", description="Activation of the image encoder.")
    image_mean: tuple[float, float, float] = Field(
        (0.5, 0.5, 0.5), description="Subtracted from red, green and blue, which lie between 0 and 1."
    )
    image_std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="Divides what `image_mean` leaves.")
    audio_hidden_size: int = Field(384, ge=4, multiple_of=2, description="Width of the audio encoder.")
    audio_layers: int = Field(4, ge=1, description="Blocks of the audio encoder.")
    audio_heads: int = Field(6, ge=1, description="Attention heads of the audio encoder.")
    audio_intermediate_size: int | None = Field(
        None, ge=1, description="Inner width of the audio encoder's feed-forward; null takes 4 × `audio_hidden_size`."
    )

    @property
    def image_inner_size(self) -> int:
        """Inner width of the image encoder's feed-forward, resolved."""
        return self.image_intermediate_size or 4 * self.image_hidden_size

    @property
    def audio_inner_size(self) -> int:
        """Inner width of the audio encoder's feed-forward, resolved."""
        return self.audio_intermediate_size or 4 * self.audio_hidden_size

    @property
    def image_grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def longest_audio_tokens(self) -> int:
        """Tokens of the longest sound that is taken, which has a state every 20 ms."""
        return math.ceil(math.ceil(50 * self.max_audio_seconds) / self.audio_stack)

    def without_folders(self) -> "MultimodalConfig":
        """The same encoders, for a model that holds their weights itself."""
        return self.model_copy(update={"image_encoder": None, "audio_encoder": None})

    @model_validator(mode="before")
    @classmethod
    def _takes_the_encoders(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {name: value for name, value in values.items() if value is not None or name not in cls.model_fields}
        return with_audio_encoder(with_image_encoder(known))

    @model_validator(mode="after")
    def _sizes_fit(self) -> "MultimodalConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                f"take image_size={max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        for part in ("image", "audio"):
            width, heads = getattr(self, f"{part}_hidden_size"), getattr(self, f"{part}_heads")
            if width % heads:
                raise ValueError(
                    f"{part}_hidden_size={width} is not a multiple of {part}_heads={heads}; change one of them"
                )
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={list(self.image_std)} divides: each of the three must be more than 0")
        return self
