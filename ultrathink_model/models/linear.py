"""Linear layers, whose products may be taken from elsewhere."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn


class Linear(nn.Linear):
    """`x · weightᵀ`, without a bias."""

    # From rows and weight to the product; None where it cannot take them. `native.kernels.use_native_kernels` puts it here.
    native: Callable[[Tensor, Tensor], Tensor | None] | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
        """Applies the matrix to each row."""
        if self.native is not None and (product := self.native(x, self.weight)) is not None:
            return product
        return super().forward(x)
