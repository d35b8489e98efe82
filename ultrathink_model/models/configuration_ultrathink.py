"""The `transformers` config of the architectures that it has no class for.

Together with what `modeling_ultrathink.py` imports, this file is copied into model folders, where it must run with
nothing but PyTorch and `transformers`.
"""

from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig


class UltrathinkConfig(PreTrainedConfig):
    """A causal decoder with depth routing, and with experts or without.

    The usual sizes stand at the top for tools that look for them; `architecture` is what the model is built from.

    Attributes:
        architecture: The sections of the run's config that shape the network, with every value resolved.
    """

    model_type = "ultrathink"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    layer_types: list[str] | None = None
    architecture: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None

    def sections(self) -> Any:
        """The architecture with the attributes that the model's modules read."""
        sections = (self.architecture or {}).items()
        return SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in sections})
