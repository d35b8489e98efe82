"""The `transformers` processor of a multimodal model: texts with images and sounds as the model's inputs.

Together with what it imports, this file is copied into model folders, as `modeling_ultrathink.py` is.
"""

import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ultrathink_model.media.audio import SILENCE, load_audio, log_mel
from ultrathink_model.media.counts import frame_tokens, image_tokens
from ultrathink_model.media.image import load_image, normalise_image
from ultrathink_model.media.placeholders import MEDIA_TOKENS


class UltrathinkProcessor(ProcessorMixin):
    """Tokens, pixels and spectrograms from texts with the placeholders `<image>` and `<audio>`.

    Args:
        tokenizer: The model's tokenizer.
        multimodal: The section `multimodal` of the model's config.
        chat_template: Jinja template of a conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        multimodal: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.multimodal = multimodal
        self._options: Any = SimpleNamespace(**(multimodal or {}))

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        audio: Any = None,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Inputs for `generate`, shorter texts padded on the left.

        Args:
            text: One text or several, with a placeholder for each medium.
            images: In the order of the placeholders over all texts, in one list or one for each text: paths, the bytes
                of files, or Pillow's images.
            audio: The same for sounds: paths, the bytes of files, or arrays of samples at `audio_sample_rate`.
            return_tensors: As everywhere in `transformers`.
            add_special_tokens: False for a text that a chat template has laid out.

        Returns:
            `input_ids` and `attention_mask`, (batch, seq); with images `pixel_values` (batch, images, 3, side, side); with
            sounds `input_features` (batch, clips, mel, frames) and `feature_frames` (batch, clips), 0 where a row has
            fewer clips.

        Raises:
            ValueError: There are more or fewer media than placeholders.
            MediaError: A medium cannot be read.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
        image_id, audio_id = self.tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS))
        pixels = [self._pixels(source) for source in _flat(images)]
        sounds = [self._spectrogram(source) for source in _flat(audio)]
        row_pixels = _by_row(pixels, [row.count(image_id) for row in rows], "images", MEDIA_TOKENS[0])
        row_sounds = _by_row(sounds, [row.count(audio_id) for row in rows], "audio", MEDIA_TOKENS[1])
        expanded = [
            _expanded(
                row,
                {
                    image_id: [image_tokens(self._options)] * len(own_pixels),
                    audio_id: [frame_tokens(self._options, sound.shape[1]) for sound in own_sounds],
                },
            )
            for row, own_pixels, own_sounds in zip(rows, row_pixels, row_sounds, strict=True)
        ]
        data: dict[str, Any] = self._padded(expanded)
        if pixels:
            data["pixel_values"] = _stacked(row_pixels, pixels[0].shape, 0.0)
        if sounds:
            frames = max(sound.shape[1] for sound in sounds)
            data["input_features"] = _stacked(row_sounds, (sounds[0].shape[0], frames), SILENCE)
            true_frames = [[np.array(sound.shape[1]) for sound in own] for own in row_sounds]
            data["feature_frames"] = _stacked(true_frames, (), 0.0).astype(np.int64)
        return BatchFeature(data, tensor_type=return_tensors)

    def _pixels(self, source: Any) -> np.ndarray:
        if hasattr(source, "save"):
            stream = io.BytesIO()
            source.save(stream, "PNG")
            source = stream.getvalue()
        return normalise_image(load_image(source, self._options), self._options)

    def _spectrogram(self, source: Any) -> np.ndarray:
        is_samples = isinstance(source, np.ndarray | torch.Tensor)
        samples = np.asarray(source, dtype=np.float32) if is_samples else load_audio(source, self._options)
        longest = round(self._options.max_audio_seconds * self._options.audio_sample_rate)
        if samples.ndim != 1 or not self._options.audio_sample_rate // 100 <= len(samples) <= longest:
            raise ValueError(
                f"audio: samples of shape {samples.shape}, which must be one row of 10 ms to "
                f"{self._options.max_audio_seconds:g} s at {self._options.audio_sample_rate} a second"
            )
        return log_mel(samples, self._options)

    def _padded(self, rows: list[list[int]]) -> dict[str, Any]:
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        return {
            "input_ids": np.array([[pad] * (longest - len(row)) + row for row in rows], dtype=np.int64),
            "attention_mask": np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=np.int64),
        }


def _flat(media: Any) -> list[Any]:
    """The media one after the other, however they were given."""
    if media is None:
        return []
    if not isinstance(media, list | tuple):
        return [media]
    return [medium for part in media for medium in (part if isinstance(part, list | tuple) else [part])]


def _by_row(media: list[Any], counts: list[int], argument: str, placeholder: str) -> list[list[Any]]:
    if len(media) != sum(counts):
        raise ValueError(f"{argument}: {len(media)} were given, and the text has {sum(counts)} times {placeholder}")
    rest = iter(media)
    return [[next(rest) for _ in range(count)] for count in counts]


def _expanded(row: list[int], sizes: dict[int, list[int]]) -> list[int]:
    """The tokens with each placeholder as often as its medium has tokens."""
    left = {token: iter(numbers) for token, numbers in sizes.items()}
    return [token for token in row for _ in range(next(left[token]) if token in left else 1)]


def _stacked(rows: list[list[np.ndarray]], shape: tuple[int, ...], filling: float) -> np.ndarray:
    """The arrays of each row side by side, filled up to the longest row, and each to `shape`."""
    whole = np.full((len(rows), max(len(row) for row in rows), *shape), filling, dtype=np.float32)
    for number, row in enumerate(rows):
        for place, array in enumerate(row):
            spot: tuple[Any, ...] = (number, place, *(slice(0, size) for size in array.shape))
            whole[spot] = array
    return whole
