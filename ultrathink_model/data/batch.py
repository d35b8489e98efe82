"""A batch of packed sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ultrathink_model.data.pack import IGNORED, Row
from ultrathink_model.media.batch import MediaBatch

NO_GROUP = -1


@dataclass
class Batch:
    """Sequences that go through the model together.

    `labels` stand at the position that predicts them, already shifted; -100 is not predicted. `document_ids` number
    the documents within each row and are None when no row holds two of them. `source_groups` holds the expert group
    0 … 3 of each token's source, -1 for none, and is None when no source is tagged. `harm_labels` belongs to the last
    rows, whose texts are labelled for harm and are not predicted: bit c is set where category c applies. `media` holds
    the images and sounds that some of the tokens stand for, and is None where none does.
    """

    input_ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    document_ids: Int[Tensor, "batch seq"] | None
    source_groups: Int[Tensor, "batch seq"] | None
    num_tokens: int
    harm_labels: Int[Tensor, "labelled seq"] | None = None
    media: MediaBatch | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, which a GPU reads without waiting."""
        return self._apply(lambda tensor: tensor.pin_memory())

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            document_ids=None if self.document_ids is None else function(self.document_ids),
            source_groups=None if self.source_groups is None else function(self.source_groups),
            num_tokens=self.num_tokens,
            harm_labels=None if self.harm_labels is None else function(self.harm_labels),
            media=None if self.media is None else self.media.apply(function),
        )


def make_batch(rows: Sequence[Row], groups: Sequence[int], media: MediaBatch | None = None) -> Batch:
    """Stacks rows; `groups` names each row's expert group, -1 for none, and `media` is what they hold of media."""
    labels = np.stack([row.labels for row in rows])
    document_ids = np.stack([row.document_ids for row in rows])
    tagged = any(group != NO_GROUP for group in groups)
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        labels=torch.from_numpy(labels),
        document_ids=torch.from_numpy(document_ids) if document_ids.any() else None,
        source_groups=torch.tensor(groups)[:, None].repeat(1, labels.shape[1]) if tagged else None,
        num_tokens=int((labels != IGNORED).sum()),
        media=media,
    )
