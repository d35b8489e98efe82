"""The keys and values that generation keeps between calls, one cache for each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.models.attention import LayerCache
from ultrathink_model.models.tokens import Tokens
from ultrathink_model.models.transformer import is_routed

# Columns a ragged cache takes at once. Each time it is full it asks the device how long the longest row has become.
RAGGED_ROOM = 64
# Position of an empty slot: later than every token, so that none looks at it.
NOWHERE = torch.iinfo(torch.int64).max // 2


class KVCache(Sequence[LayerCache]):
    """The caches of all blocks, in their order.

    Args:
        config: The model's config.
        capacity: Columns that dense blocks make room for at once; more are taken when they are needed.

    Attributes:
        length: Columns of the calls so far, padding included: the position of the next token. Whoever calls the model
            adds to it.
    """

    def __init__(self, config: Config, capacity: int) -> None:
        self.length = 0
        self._columns = Columns()
        self._layers = [
            RaggedLayerCache() if is_routed(config, layer) else DenseLayerCache(self._columns, capacity)
            for layer in range(config.model.num_layers)
        ]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> LayerCache:  # type: ignore[override]  # a slice of layers has no use
        return self._layers[layer]

    @property
    def kept(self) -> list[int]:
        """Tokens whose keys and values each block holds, over all rows."""
        return [layer.kept for layer in self._layers]

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps only `rows`, in their order; a row may come more than once."""
        self._columns.select(rows)
        for layer in self._layers:
            layer.select(rows)


class Columns:
    """What every dense block shares: which columns hold real tokens, and the mask of the call at hand."""

    def __init__(self) -> None:
        self._length = 0
        self._valid: Bool[Tensor, "batch columns"] | None = None
        self._tokens: Tokens | None = None
        self._mask: Bool[Tensor, "batch 1 seq keys"] | None = None
        self._first_key = 0

    def enter(self, tokens: Tokens) -> tuple[int, Bool[Tensor, "batch 1 seq keys"] | None]:
        """Takes in the tokens of a call, once for all blocks.

        Returns:
            The first column that any of them may look at, and the mask over the columns from there; None where the
            tokens are the first and the causal triangle says it all, or a single one that sees all of them.
        """
        if tokens is not self._tokens:
            assert tokens.document_ids is None, "a cache holds one document a row"
            start, self._length = self._length, self._length + tokens.positions.shape[1]
            self._valid = self._valid_with(tokens, start)
            window = tokens.sliding_window
            self._first_key = 0 if window is None else max(0, start - window + 1)
            if start == 0:
                self._mask = tokens.self_mask
            elif self._valid is None and tokens.positions.shape[1] == 1:
                self._mask = None  # one token, behind all those that its window holds
            else:
                self._mask = tokens.mask_over(self._keys(tokens))
            self._tokens = tokens
        return self._first_key, self._mask

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps only `rows`."""
        if self._valid is not None:
            self._valid = self._valid.index_select(0, rows)

    def _valid_with(self, tokens: Tokens, start: int) -> Tensor | None:
        """Which columns are real, those of `tokens` included; None where all are."""
        if self._valid is None and tokens.valid is None:
            return None
        known = tokens.valid if self._valid is None else self._valid
        assert known is not None
        old = known.new_ones(known.shape[0], start) if self._valid is None else self._valid
        new = known.new_ones(known.shape[0], tokens.positions.shape[1]) if tokens.valid is None else tokens.valid
        return torch.cat((old, new), dim=1)

    def _keys(self, tokens: Tokens) -> Tokens:
        positions = torch.arange(self._first_key, self._length, device=tokens.positions.device).unsqueeze(0)
        return Tokens(positions, valid=None if self._valid is None else self._valid[:, self._first_key :])


class DenseLayerCache:
    """The keys and values of a block that every token passes: one buffer, the same length for all rows."""

    def __init__(self, columns: Columns, capacity: int) -> None:
        self._columns = columns
        self._capacity = capacity
        self._length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None  # keys and values, (batch, kv_heads, capacity, head_dim)

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads seq head_dim"],
        values: Float[Tensor, "batch kv_heads seq head_dim"],
        tokens: Tokens,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds a call's keys and values; see `LayerCache`."""
        first_key, mask = self._columns.enter(tokens)
        start, end = self._length, self._length + keys.shape[2]
        if self._buffers is None:
            columns = max(self._capacity, end)
            self._buffers = _widened(keys[:, :, :0], columns), _widened(values[:, :, :0], columns)
        elif end > self._buffers[0].shape[2]:
            self._buffers = _widened(self._buffers[0], 2 * end), _widened(self._buffers[1], 2 * end)
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, start:end] = states
        self._length = end
        return self._buffers[0][:, :, first_key:end], self._buffers[1][:, :, first_key:end], mask

    @property
    def kept(self) -> int:
        """Tokens held, padding included."""
        return 0 if self._buffers is None else self._buffers[0].shape[0] * self._length

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps only `rows`."""
        if self._buffers is not None:
            self._buffers = self._buffers[0].index_select(0, rows), self._buffers[1].index_select(0, rows)


@dataclass
class _Ragged:
    """Rows of different lengths, side by side; the last column takes what no row keeps."""

    keys: Float[Tensor, "batch kv_heads columns head_dim"]
    values: Float[Tensor, "batch kv_heads columns head_dim"]
    positions: Int[Tensor, "batch columns"]
    lengths: Int[Tensor, "batch 1"]

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor) -> "_Ragged":
        """No columns, with the other sizes of `keys` and `values`."""
        lengths = torch.zeros(keys.shape[0], 1, dtype=torch.int64, device=keys.device)
        return cls(keys[:, :, :0], values[:, :, :0], lengths[:, :0], lengths)

    @property
    def columns(self) -> int:
        return self.positions.shape[1]

    def widened(self, columns: int, used: int) -> "_Ragged":
        """The same rows with `columns` columns, of which the first `used` are kept."""
        positions = self.positions.new_full((self.positions.shape[0], columns), NOWHERE)
        positions[:, :used] = self.positions[:, :used]
        keys, values = (_widened(buffer[:, :, :used], columns) for buffer in (self.keys, self.values))
        return _Ragged(keys, values, positions, self.lengths)

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor) -> None:
        """Adds each row's valid tokens behind those that it has."""
        slots = self.lengths + valid.cumsum(dim=1) - 1
        slots = slots.where(valid, self.columns - 1)  # (batch, seq)
        self.positions.scatter_(1, slots, positions.expand_as(slots))
        for buffer, states in ((self.keys, keys), (self.values, values)):
            buffer.scatter_(2, slots[:, None, :, None].expand_as(states), states)
        self.lengths += valid.sum(dim=1, keepdim=True)

    def select(self, rows: Tensor) -> "_Ragged":
        parts = (self.keys, self.values, self.positions, self.lengths)
        return _Ragged(*(part.index_select(0, rows) for part in parts))


class RaggedLayerCache:
    """The keys and values of a block that is routed in depth: each row holds those of its own tokens that passed it.

    Tokens that are not valid leave nothing, so the buffers are as wide as the longest row, and a column's position
    differs from row to row.
    """

    def __init__(self) -> None:
        self._rows: _Ragged | None = None
        self._longest = 0  # as far as is known without asking the device: never too small

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads seq head_dim"],
        values: Float[Tensor, "batch kv_heads seq head_dim"],
        tokens: Tokens,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds the keys and values of the valid tokens; see `LayerCache`."""
        is_first, new = self._rows is None, keys.shape[2]
        rows = self._with_room(_Ragged.empty(keys, values) if self._rows is None else self._rows, new)
        valid = torch.ones_like(keys[:, 0, :, 0], dtype=torch.bool) if tokens.valid is None else tokens.valid
        rows.write(keys, values, tokens.positions, valid)
        self._rows, self._longest = rows, self._longest + new
        if is_first:
            return keys, values, tokens.self_mask
        # A token that is not valid may look at nothing at all, whatever that gives: it is thrown away.
        mask = tokens.mask_over(Tokens(rows.positions[:, : self._longest]))
        return rows.keys[:, :, : self._longest], rows.values[:, :, : self._longest], mask

    @property
    def kept(self) -> int:
        """Tokens held."""
        return 0 if self._rows is None else int(self._rows.lengths.sum())

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps only `rows`."""
        if self._rows is not None:
            self._rows = self._rows.select(rows)

    def _with_room(self, rows: _Ragged, new: int) -> _Ragged:
        """The rows with `new` free columns and the last one."""
        if self._longest + new < rows.columns:
            return rows
        self._longest = int(rows.lengths.max())
        return rows.widened(self._longest + new + RAGGED_ROOM, self._longest)


def _widened(used: Tensor, columns: int) -> Tensor:
    """`used` (batch, heads, used columns, width) with zeros behind, up to `columns` columns."""
    wider = used.new_zeros(used.shape[0], used.shape[1], columns, used.shape[3])
    wider[:, :, : used.shape[2]] = used
    return wider
