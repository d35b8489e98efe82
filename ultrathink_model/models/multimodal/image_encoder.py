"""The vision transformer, as CLIP and SigLIP have it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ultrathink_model.config import Config
from ultrathink_model.models.multimodal.encoder_block import EncoderBlock, draw_encoder
from ultrathink_model.models.recomputation import run_block

NORM_EPS = {"clip": 1e-5, "siglip": 1e-6}
CHANNELS = 3


class ImageEncoder(nn.Module):
    """Dosovitskiy et al. 2020 (arXiv 2010.11929): patches as tokens with learned positions, then pre-norm blocks.

    `clip` has a class token, and a norm before the blocks (Radford et al. 2021, arXiv 2103.00020); `siglip` a bias on
    the patches, and a norm behind the blocks (Zhai et al. 2023, arXiv 2303.15343). The result is the patches' last
    states, without the class token. Positions are interpolated for an image of another size.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        media = config.multimodal
        width, architecture = media.image_hidden_size, media.image_architecture
        is_clip, eps = architecture == "clip", NORM_EPS[architecture]
        self.config = config
        self.patch_size = media.patch_size
        # A product with each patch: the convolution of that size and stride.
        self.patches = nn.Linear(CHANNELS * media.patch_size**2, width, bias=not is_clip)
        self.class_token = nn.Parameter(torch.empty(width)) if is_clip else None
        self.positions = nn.Parameter(torch.empty(media.image_grid**2 + is_clip, width))
        self.first_norm = nn.LayerNorm(width, eps=eps) if is_clip else None
        self.blocks = nn.ModuleList(
            EncoderBlock(width, media.image_heads, media.image_inner_size, media.image_activation, eps)
            for _ in range(media.image_layers)
        )
        self.last_norm = None if is_clip else nn.LayerNorm(width, eps=eps)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draws the weights."""
        draw_encoder(self.named_parameters(), len(self.blocks), generator)

    def forward(self, images: Float[Tensor, "images 3 side side"]) -> Float[Tensor, "images patches width"]:
        """The state of each patch, row by row of the image."""
        x = self.patches(_cut(images, self.patch_size))  # (images, patches, width)
        grid = images.shape[-1] // self.patch_size
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x), dim=1)
        x = x + resized_positions(self.positions, grid).to(x.dtype)
        if self.first_norm is not None:
            x = self.first_norm(x)
        recomputes = self.config.model.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = run_block(self.config, block, x) if recomputes else block(x)
        return x[:, 1:] if self.last_norm is None else self.last_norm(x)


def resized_positions(positions: Float[Tensor, "places width"], grid: int) -> Float[Tensor, "other width"]:
    """Positions of a square grid, and of a class token before it if there is one, brought to another grid's size."""
    side = int(positions.shape[0] ** 0.5)
    if side == grid:
        return positions
    before, square = positions[: positions.shape[0] - side**2], positions[positions.shape[0] - side**2 :]
    square = square.view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, width, side, side)
    square = F.interpolate(square.float(), size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((before, square.to(before.dtype).flatten(2).squeeze(0).T))


def _cut(images: Tensor, size: int) -> Tensor:
    """The pixels of each patch, channel after channel: (images, patches, 3 · size²)."""
    count, channels, side, _ = images.shape
    grid = side // size
    cut = images.view(count, channels, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(count, grid * grid, channels * size * size)
