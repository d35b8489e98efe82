"""The decoder as a `transformers` model, for the architectures that it has no class for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.media.batch import NO_SLOT, MediaBatch
from ultrathink_model.models.configuration_ultrathink import UltrathinkConfig
from ultrathink_model.models.kv_cache import KVCache
from ultrathink_model.models.transformer import Transformer

# Tokens beyond the prompt that a cache has room for at first.
CACHE_ROOM = 64


class UltrathinkCache(Cache):
    """Our cache with the methods that `generate` calls."""

    is_croppable = False

    def __init__(self, blocks: KVCache) -> None:
        super().__init__(layers=[])
        self.blocks = blocks

    def get_seq_length(self, _layer: int = 0) -> int:
        """Tokens taken in, padding included."""
        return self.blocks.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the rows into the order of the surviving beams."""
        self.blocks.select(beam_idx)


class UltrathinkForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder behind the interface of `transformers`, for use and not for training: the loss leaves out the routers'.

    `generate` runs with our cache, in which skipped tokens take no room. The cache cannot be rolled back to an earlier
    token, so there is no assisted generation.
    """

    config_class = UltrathinkConfig
    base_model_prefix = "model"
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 - the name and the type are the library's
    _is_stateful = True

    def __init__(self, config: UltrathinkConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.sections())
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output projection; None where it is the embedding."""
        return self.model.head

    @torch.no_grad()
    def harm_scores(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Probability that a text does harm, (batch,) for each category; empty for a model without a harm head.

        Args:
            input_ids: (batch, seq) tokens, shorter texts padded on the left.
            attention_mask: (batch, seq), 0 at padding.
        """
        if self.model.harm_head is None:
            return {}
        mask = None if attention_mask is None else attention_mask.bool()
        hidden = self.model(input_ids, attention_mask=mask, return_logits=False).hidden
        scores = self.model.harm_head(hidden[:, -1]).sigmoid()
        return dict(zip(self.model.config.advanced.harm_categories, scores.unbind(-1), strict=True))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: UltrathinkCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_frames: Tensor | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor | UltrathinkCache, ...]:
        """Logits, with the mean loss of `labels` (not shifted; -100 is left out) where they are given.

        Args:
            input_ids: (batch, seq) tokens that are not in the cache.
            attention_mask: (batch, cached + seq), 0 at padding; columns further left than `seq` were seen before.
            past_key_values: What an earlier call returned.
            labels: (batch, seq) tokens.
            use_cache: Whether to return a cache; None takes the config's, or False where gradients are recorded.
            logits_to_keep: Last positions whose logits are wanted, or their indices; 0 wants all.
            return_dict: False returns a tuple.
            pixel_values: (batch, images, 3, side, side), in the order of their tokens; what a row has too many is left out.
            input_features: (batch, clips, mel, frames), in the order of their tokens.
            feature_frames: (batch, clips) true frames; 0 where a row has no such clip.
            loss_options: What a trainer says of the loss, `num_items_in_batch` for one.
        """
        seq = input_ids.shape[1]
        cache = past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()  # the cache is written in place
        if use_cache and cache is None:
            cache = UltrathinkCache(KVCache(self.model.config, seq + CACHE_ROOM))
        is_first = cache is None or cache.blocks.length == 0
        output = self.model(
            input_ids,
            media=self._media(input_ids, pixel_values, input_features, feature_frames) if is_first else None,
            attention_mask=None if attention_mask is None else attention_mask[:, -seq:].bool(),
            cache=None if cache is None else cache.blocks,
            start=0 if cache is None else cache.blocks.length,
            return_logits=False,
        )
        if cache is not None:
            cache.blocks.length += seq
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = F.linear(output.hidden[:, kept], self.model.output_weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return result if return_dict is not False else result.to_tuple()

    def _media(
        self, tokens: Tensor, pixels: Tensor | None, features: Tensor | None, frames: Tensor | None
    ) -> MediaBatch | None:
        if pixels is None and features is None:
            return None
        if self.model.media_encoder is None:
            raise ValueError("pixel_values or input_features were given to a model without encoders")
        placeholders = self.config.image_token_id, self.config.audio_token_id
        media = make_media(self.model.config.multimodal, tokens, placeholders, pixels, features, frames)
        media.images = None if media.images is None else media.images.to(self.dtype)
        media.audio = None if media.audio is None else media.audio.to(self.dtype)
        return media


def make_media(
    options: MultimodalConfig,
    tokens: Tensor,
    placeholders: Sequence[int],
    pixel_values: Tensor | None = None,
    input_features: Tensor | None = None,
    feature_frames: Tensor | None = None,
) -> MediaBatch:
    """What the processor made of media, with the places of their tokens, which are whole and in order.

    Args:
        options: The model's section `multimodal`.
        tokens: (batch, seq).
        placeholders: The tokens of an image and of a sound.
        pixel_values: (batch, images, 3, side, side); what a row has too many is left out.
        input_features: (batch, clips, mel, frames).
        feature_frames: (batch, clips) true frames; 0 where a row has no such clip.
    """
    media = MediaBatch()
    is_image, is_audio = (tokens == placeholder for placeholder in placeholders)
    if pixel_values is not None:
        patches = options.image_grid**2
        numbers = torch.arange(pixel_values.shape[1], device=tokens.device)
        media.images = pixel_values[numbers < is_image.sum(dim=1, keepdim=True) // patches]
        media.image_slots = _slots(is_image, media.images.shape[0] * patches)
    if input_features is not None:
        assert feature_frames is not None, "feature_frames go with input_features"
        is_clip = feature_frames > 0
        media.audio, media.audio_frames = input_features[is_clip], feature_frames[is_clip]
        states = (media.audio_frames + 1) // 2
        media.audio_slots = _slots(is_audio, int(((states - 1) // options.audio_stack + 1).sum()))
    return media


def _slots(is_medium: Tensor, states: int) -> Tensor:
    """Which state each placeholder takes, row after row; -1 for other tokens, and for those beyond the last state."""
    order = is_medium.flatten().cumsum(dim=0).view_as(is_medium) - 1
    return order.where(is_medium & (order < states), NO_SLOT)
