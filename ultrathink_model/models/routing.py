"""What a routed layer reports: auxiliary losses for the objective, counts for its balance and the reader."""

from dataclasses import dataclass, field

from jaxtyping import UInt8
from torch import Tensor


@dataclass
class Routing:
    """The report of one block on one micro-batch; both parts are sums over tokens, so micro-batches and ranks add.

    `losses` are weighted and differentiable, by the name under which they are logged. `counts` are detached, by a
    name within the block. `passes` holds, for each block that is routed in depth, the passes of it that each token
    made; it is no sum, and reports together hold one after the other's.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    passes: tuple[UInt8[Tensor, "batch seq"], ...] = ()

    def merge(self, other: "Routing") -> "Routing":
        """Both reports together; what both name is added."""
        return Routing(_added(self.losses, other.losses), _added(self.counts, other.counts), self.passes + other.passes)


def _added(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: first[name] + second[name] if name in first and name in second else (first | second)[name]
        for name in first | second
    }
