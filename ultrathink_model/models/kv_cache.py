"""The keys and values that generation keeps between calls, one cache for each block."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ultrathink_model.models.attention import LayerCache
from ultrathink_model.models.tokens import Tokens


class Columns:
    """What every dense layer shares: which columns hold real tokens, and the mask of the call at hand."""

    def __init__(self) -> None:
        self.length = 0
        self._valid: Bool[Tensor, "batch columns"] | None = None
        self._tokens: Tokens | None = None
        self._mask: Bool[Tensor, "batch 1 seq keys"] | None = None
        self._first_key = 0

    def enter(self, tokens: Tokens) -> tuple[int, Bool[Tensor, "batch 1 seq keys"] | None]:
        """Takes in the tokens of a call, once for all layers.

        Returns:
            The first column that any of them may look at, and the mask over the columns from there; None where the
            tokens are the first and the causal triangle says it all.
        """
        if tokens is not self._tokens:
            assert tokens.document_ids is None, "a cache holds one document a row"
            start, self.length = self.length, self.length + tokens.positions.shape[1]
            self._tokens, self._valid = tokens, self._extended_valid(tokens, start)
            window = tokens.sliding_window
            self._first_key = 0 if window is None else max(0, start - window + 1)
            self._mask = tokens.self_mask if start == 0 else tokens.mask_over(self._keys(tokens))
        return self._first_key, self._mask

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps only `rows`, in their order; a row may come more than once."""
        self._tokens = None
        if self._valid is not None:
            self._valid = self._valid.index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forgets all columns from `length` on."""
        self.length, self._tokens = length, None
        if self._valid is not None:
            self._valid = self._valid[:, :length]

    def _extended_valid(self, tokens: Tokens, start: int) -> Tensor | None:
        if self._valid is None and tokens.valid is None:
            return None
        new = tokens.valid
        if new is None:
            assert self._valid is not None
            new = self._valid.new_ones(self._valid.shape[0], tokens.positions.shape[1])
        old = new.new_ones(new.shape[0], start) if self._valid is None else self._valid
        return torch.cat((old, new), dim=1)

    def _keys(self, tokens: Tokens) -> Tokens:
        positions = torch.arange(self._first_key, self.length, device=tokens.positions.device).unsqueeze(0)
        valid = None if self._valid is None else self._valid[:, self._first_key :]
        return Tokens(positions, valid=valid)


class DenseLayerCache:
    """The keys and values of a layer that every token passes: one buffer, the same length for all rows."""

    def __init__(self, columns: Columns, capacity: int) -> None:
        self._columns = columns
        self._capacity = capacity
        self._length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads seq head_dim"],
        values: Float[Tensor, "batch kv_heads seq head_dim"],
        tokens: Tokens,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds a call's keys and values; see `LayerCache`."""
        first_key, mask = self._columns.enter(tokens)
        start, end = self._length, self._length + keys.shape[2]
        self._keys = _with_room(self._keys, keys, start, max(end, self._capacity))
        self._values = _with_room(self._values, values, start, max(end, self._capacity))
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        self._length = end
        return self._keys[:, :, first_key:end], self._values[:, :, first_key:end], mask

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps only `rows`, in their order; a row may come more than once."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forgets all columns from `length` on."""
        self._length = min(self._length, length)

    @property
    def entries(self) -> int:
        """Keys held, over all rows."""
        return 0 if self._keys is None else self._keys.shape[0] * self._length


class KVCache(Sequence[LayerCache]):
    """The caches of all blocks, in their order.

    Args:
        num_layers: Blocks of the model.
        capacity: Columns to make room for at once; more are taken when they are needed.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self._columns = Columns()
        self._layers = [DenseLayerCache(self._columns, capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Columns taken in, padding included: the position of the next token."""
        return self._columns.length

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> LayerCache:  # type: ignore[override]  # a slice of layers has no use
        return self._layers[layer]


def _with_room(buffer: Tensor | None, new: Tensor, used: int, needed: int) -> Tensor:
    """The buffer, or a larger one with its first `used` columns."""
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    batch, heads, _, width = new.shape
    room = needed if buffer is None else max(needed, 2 * buffer.shape[2])
    larger = new.new_zeros(batch, heads, room, width)
    if buffer is not None:
        larger[:, :, :used] = buffer[:, :, :used]
    return larger
