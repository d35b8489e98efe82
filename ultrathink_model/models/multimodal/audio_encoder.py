"""The audio encoder, as Whisper has it."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ultrathink_model.config import Config
from ultrathink_model.models.multimodal.encoder_block import EncoderBlock, draw_encoder
from ultrathink_model.models.recomputation import run_block

NORM_EPS = 1e-5
# Longest wavelength of the positions, in states.
MAX_WAVELENGTH = 10_000.0


class AudioEncoder(nn.Module):
    """Radford et al. 2022 (arXiv 2212.04356): two convolutions, of which the second halves the frames, then blocks.

    Whisper pads each sound to 30 seconds and looks at the padding. Here a clip is as long as it is: what lies behind its
    end is zero to the convolutions and is looked at by nobody, so that a clip's states do not depend on the others.
    Positions are sinusoids, which Whisper keeps as a weight.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        media = config.multimodal
        width = media.audio_hidden_size
        self.config = config
        self.first_convolution = nn.Conv1d(media.mel_bins, width, kernel_size=3, padding=1)
        self.second_convolution = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, media.audio_heads, media.audio_inner_size, "gelu", NORM_EPS)
            for _ in range(media.audio_layers)
        )
        self.last_norm = nn.LayerNorm(width, eps=NORM_EPS)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draws the weights."""
        draw_encoder(self.named_parameters(), len(self.blocks), generator)

    def forward(
        self, audio: Float[Tensor, "clips mel frames"], frames: Int[Tensor, " clips"]
    ) -> tuple[Float[Tensor, "clips states width"], Bool[Tensor, "clips states"]]:
        """A state for every second frame, and which of them lie within their clip.

        Args:
            audio: Log-mel frames, padded to the longest clip.
            frames: True frames of each clip.
        """
        inside = _first(frames, audio.shape[2]).unsqueeze(1)  # (clips, 1, frames)
        x = F.gelu(self.first_convolution(audio.where(inside, 0.0)))
        x = F.gelu(self.second_convolution(x.where(inside, 0.0))).transpose(1, 2)  # (clips, states, width)
        x = x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)
        inside = _first((frames + 1) // 2, x.shape[1])  # (clips, states)
        mask = inside[:, None, None, :]
        recomputes = self.config.model.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = run_block(self.config, block, x, mask) if recomputes else block(x, mask)
        return self.last_norm(x), inside


def sinusoids(length: int, width: int, device: torch.device) -> Float[Tensor, "length width"]:
    """Sines, then cosines, of wavelengths that grow evenly in the logarithm (Vaswani et al. 2017, arXiv 1706.03762)."""
    rates = torch.exp(torch.arange(width // 2, device=device) * (-math.log(MAX_WAVELENGTH) / max(1, width // 2 - 1)))
    angles = torch.outer(torch.arange(length, device=device), rates)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _first(counts: Tensor, length: int) -> Tensor:
    """(clips, length): whether a place is among the first `counts` of its clip."""
    return torch.arange(length, device=counts.device) < counts.unsqueeze(1)
