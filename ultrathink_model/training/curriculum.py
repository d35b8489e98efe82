"""A curriculum of sequence length: the first steps learn from short pieces of the same rows."""

import dataclasses

from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.data import Batch


def sequence_length(config: Config, step: int) -> int:
    """Length of the sequences of optimizer step `step` (from 0).

    It begins at `training.first_seq_length` and doubles at even distances until it is `model.max_seq_length`, at
    step `training.seq_length_steps` (after Li et al. 2022, https://arxiv.org/abs/2108.06084, who cut rows off).
    """
    first, full = config.training.first_seq_length, config.model.max_seq_length
    if first is None or step >= config.training.seq_length_steps:
        return full
    doublings = (full // first).bit_length() - 1
    return int(first << (doublings * step // config.training.seq_length_steps))


def cut_rows(batch: Batch, length: int) -> Batch:
    """The batch with each row cut into rows of `length`: the same tokens to predict, each with less before it."""
    if batch.input_ids.shape[1] == length:
        return batch

    def pieces(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, length)  # (batch · seq / length, length)

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else pieces(tensor)

    return dataclasses.replace(
        batch,
        input_ids=pieces(batch.input_ids),
        labels=pieces(batch.labels),
        document_ids=cut(batch.document_ids),
        source_groups=cut(batch.source_groups),
        harm_labels=cut(batch.harm_labels),
        media=None if batch.media is None else batch.media.with_slots(pieces),
    )
