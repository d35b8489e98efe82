"""What attention and routing must know about each token: where it stands and whom it may see."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Tokens:
    """Positions, documents and validity of a (batch, seq) grid of tokens, in the order of their rows.

    `positions` grow along a row. `document_ids` of None means that each row is one document, `valid` of None
    that there is no padding, `source_groups` of None that no source is tagged with an expert group, `modalities` of None
    that all is text. `width` is that of the grid that these tokens were selected from, None for a whole one.
    """

    positions: Int[Tensor, "#batch seq"]
    document_ids: Int[Tensor, "batch seq"] | None = None
    valid: Bool[Tensor, "batch seq"] | None = None
    source_groups: Int[Tensor, "batch seq"] | None = None
    sliding_window: int | None = None
    modalities: Int[Tensor, "batch seq"] | None = None
    width: int | None = None
    # Holds the mask once it is made. `cached_property` has a lock, which torch.compile does not enter.
    _self_mask: list[Tensor | None] = field(default_factory=list, init=False, repr=False, compare=False)

    def select(
        self, index: Int[Tensor, "batch chosen"], last_padded: Bool[Tensor, "batch chosen"] | None = None
    ) -> "Tokens":
        """The tokens at `index` of each row, which must be in rising order.

        Args:
            index: Columns.
            last_padded: The last of each row, in any order, that stand for no token.
        """

        def chosen(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.expand(index.shape[0], -1).gather(1, index)

        selected = replace(
            self,
            positions=self.positions.expand(index.shape[0], -1).gather(1, index),
            document_ids=chosen(self.document_ids),
            valid=chosen(self.valid) if last_padded is None else ~last_padded,
            source_groups=chosen(self.source_groups),
            modalities=chosen(self.modalities),
            width=self.width or self.positions.shape[1],
        )
        if last_padded is not None and self.document_ids is None and self.valid is None and self._window_reaches_all:
            # No token looks at what comes behind it, so the triangle keeps them from that padding.
            selected._self_mask.append(None)
        return selected

    @property
    def self_mask(self) -> Bool[Tensor, "batch 1 seq seq"] | None:
        """Which token may look at which, within the grid; None where the plain causal triangle says it all."""
        if not self._self_mask:
            plain = self.document_ids is None and self.valid is None and self._window_reaches_all
            self._self_mask.append(None if plain else self.mask_over(self))
        return self._self_mask[0]

    def with_mask(self) -> "Tokens":
        """These tokens, their mask made now: a compiled block that is checkpointed may not make it as it goes."""
        _ = self.self_mask
        return self

    @property
    def _window_reaches_all(self) -> bool:
        return self.sliding_window is None or self.sliding_window >= (self.width or self.positions.shape[1])

    def mask_over(self, keys: "Tokens") -> Bool[Tensor, "batch 1 seq keys"]:
        """Which of `keys` each token may look at: its past, its document, its window, and no padding.

        A token may always look at its own position, so that a row of padding has no empty softmax.
        """
        distance = self.positions[:, :, None] - keys.positions[:, None, :]  # (batch, seq, keys)
        allowed = distance >= 0
        if self.sliding_window is not None:
            allowed = allowed & (distance < self.sliding_window)
        if self.document_ids is not None and keys.document_ids is not None:
            allowed = allowed & (self.document_ids[:, :, None] == keys.document_ids[:, None, :])
        if keys.valid is not None:
            allowed = allowed & keys.valid[:, None, :]
        return (allowed | (distance == 0)).unsqueeze(1)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary embedding, one row a position (Su et al. 2021, arXiv 2104.09864).

    The sines of the first half are negative: `(a, b)` becomes `(a cos - b sin, b cos + a sin)`.
    """

    cos: Tensor  # (positions, head_dim)
    sin: Tensor  # (positions, head_dim)
    _last: list[tuple[Tensor, "Rotation"]] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def table(cls, length: int, head_dim: int, theta: float, device: torch.device) -> "Rotation":
        """The table for positions 0 to `length - 1`, in float32."""
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        return cls(torch.cat((angles, angles), dim=1).cos(), torch.cat((-angles, angles), dim=1).sin())

    def at(self, positions: Int[Tensor, "batch seq"]) -> "Rotation":
        """The rows of `positions`, shaped (batch, seq, 1, head_dim) to broadcast over heads.

        They are looked up once for all the blocks that ask for the same tensor one after the other.
        """
        if torch.compiler.is_compiling():
            return self._look_up(positions)
        if not self._last or self._last[0][0] is not positions:
            self._last[:] = [(positions, self._look_up(positions))]
        return self._last[0][1]

    def _look_up(self, positions: Tensor) -> "Rotation":
        return Rotation(self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2))

    def apply(self, x: Tensor) -> Tensor:
        """Turns (batch, seq, heads, head_dim) by the angle of each position, pairing halves as Qwen3 does."""
        cos, sin = (self.cos, self.sin) if self.cos.dtype == x.dtype else (self.cos.to(x.dtype), self.sin.to(x.dtype))
        return _Turn.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin)


class _Turn(torch.autograd.Function):
    """A rotation, whose gradient is turned back by the same angle. Autograd would make the pieces one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).addcmul_(_halves_swapped(grad), sin, value=-1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos).addcmul_(_halves_swapped(x), sin)


def _halves_swapped(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, dims=-1)
