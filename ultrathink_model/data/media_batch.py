"""The media of a batch of rows, as the encoders take them, and the slots of their tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ultrathink_model.data.manifest import MediaInfo
from ultrathink_model.data.media_index import Run
from ultrathink_model.data.media_store import MediaStore
from ultrathink_model.media.audio import SILENCE
from ultrathink_model.media.batch import NO_SLOT, MediaBatch
from ultrathink_model.media.image import normalise_image


def make_media_batch(
    rows: Sequence[Sequence[Run]], sequence_length: int, store: MediaStore, info: MediaInfo
) -> MediaBatch | None:
    """The media that some rows hold tokens of, row after row; None where there are none.

    A medium that a row's end cuts is there for both rows.

    Args:
        rows: What each row holds of media.
        sequence_length: Length of a row.
        store: Where their pixels and spectrograms are.
        info: How pixels are normalised.
    """
    images = [(row, run) for row, runs in enumerate(rows) for run in runs if run.kind == "image"]
    sounds = [(row, run) for row, runs in enumerate(rows) for run in runs if run.kind == "audio"]
    if not images and not sounds:
        return None
    shape = (len(rows), sequence_length)
    batch = MediaBatch()
    if images:
        pixels = np.stack([store.image(run.number) for _, run in images])
        batch.images = torch.from_numpy(normalise_image(pixels, info))
        batch.image_slots = place_slots(_entries(images), shape)
    if sounds:
        spectrograms = [store.sound(run.number) for _, run in sounds]
        batch.audio, batch.audio_frames = pad_sounds(spectrograms)
        batch.audio_slots = place_slots(_entries(sounds), shape)
    return batch


def pad_sounds(spectrograms: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectrograms of (mel, frames) as one tensor of (clips, mel, longest), padded with silence, and their frames."""
    frames = [spectrogram.shape[1] for spectrogram in spectrograms]
    padded = np.full((len(frames), spectrograms[0].shape[0], max(frames)), SILENCE, dtype=np.float32)
    for clip, spectrogram in zip(padded, spectrograms, strict=True):
        clip[:, : spectrogram.shape[1]] = spectrogram
    return torch.from_numpy(padded), torch.tensor(frames)


class Entry(NamedTuple):
    """Tokens of a medium in a row of a batch.

    Attributes:
        row: The row.
        place: Where in it the first of these tokens stands.
        first: The number of that token among the medium's own.
        length: How many of them the row holds.
        tokens: How many the whole medium has.
    """

    row: int
    place: int
    first: int
    length: int
    tokens: int


def place_slots(media: Sequence[Entry], shape: tuple[int, int]) -> torch.Tensor:
    """For each token of the rows -1, or its place among the tokens of all these media laid end to end."""
    slots = np.full(shape, NO_SLOT, dtype=np.int64)
    base = 0
    for row, place, first, length, tokens in media:
        slots[row, place : place + length] = base + first + np.arange(length)
        base += tokens
    return torch.from_numpy(slots)


def _entries(media: Sequence[tuple[int, Run]]) -> list[Entry]:
    return [Entry(row, run.place, run.first, run.length, run.tokens) for row, run in media]
