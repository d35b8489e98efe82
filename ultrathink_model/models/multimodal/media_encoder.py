"""From images and sounds to states that stand in the sequence."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ultrathink_model.config import Config
from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.media.placeholders import Kind
from ultrathink_model.models.multimodal.audio_encoder import AudioEncoder
from ultrathink_model.models.multimodal.image_encoder import ImageEncoder
from ultrathink_model.models.norm import RMSNorm


class Projector(nn.Module):
    """An encoder's state as a state of the decoder: `output(gelu(inner(norm(x))))` (Liu et al. 2023, arXiv 2310.03744).

    The norm is ours: encoders end at very different scales.
    """

    def __init__(self, width: int, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=norm_eps)
        self.inner = nn.Linear(width, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch states width"]) -> Float[Tensor, "batch states hidden"]:
        """Projects each state on its own."""
        return self.output(F.gelu(self.inner(self.norm(x))))


class MediaEncoder(nn.Module):
    """Both encoders with their projections, and the placing of what they give.

    Attributes:
        runs_always: Whether a blank medium is encoded, which stands nowhere, where a batch has none of its kind: ranks
            wait for each other's gradients, or hold parts of the weights, and must all make the same calls.
    """

    runs_always: bool

    def __init__(self, config: Config) -> None:
        super().__init__()
        media, model = config.multimodal, config.model
        self.options, self.stack = media, media.audio_stack
        self.runs_always = False
        self.image_encoder = ImageEncoder(config)
        self.image_projector = Projector(media.image_hidden_size, model.hidden_size, model.norm_eps)
        self.audio_encoder = AudioEncoder(config)
        self.audio_projector = Projector(media.audio_stack * media.audio_hidden_size, model.hidden_size, model.norm_eps)
        if media.freeze_encoders:
            self.image_encoder.requires_grad_(False)
            self.audio_encoder.requires_grad_(False)

    def parameters_of(self, kind: Kind) -> Iterator[nn.Parameter]:
        """The weights that a medium of a kind goes through."""
        is_image = kind == "image"
        yield from (self.image_encoder if is_image else self.audio_encoder).parameters()
        yield from (self.image_projector if is_image else self.audio_projector).parameters()

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], media: MediaBatch | None
    ) -> Float[Tensor, "batch seq hidden"]:
        """The embedded sequences with the media's states in their places."""
        if self.runs_always:
            media = (media or MediaBatch()).with_blanks(self.options, x)
        if media is None:
            return x
        if media.images is not None:
            assert media.image_slots is not None
            x = _placed(x, self.image_projector(self.image_encoder(media.images)), media.image_slots)
        if media.audio is not None:
            assert media.audio_frames is not None
            assert media.audio_slots is not None
            states, inside = self.audio_encoder(media.audio, media.audio_frames)
            states, counts = self._stacked(states, inside)
            places = _padded_places(media.audio_slots, counts, states.shape[1])
            x = _placed(x, self.audio_projector(states), places)
        return x

    def _stacked(self, states: Tensor, inside: Bool[Tensor, "clips states"]) -> tuple[Tensor, Tensor]:
        """Neighbours joined, (clips, tokens, stack · width), with zeros behind the last; and each clip's tokens."""
        states = states.where(inside.unsqueeze(-1), 0.0)
        states = F.pad(states, (0, 0, 0, -states.shape[1] % self.stack))
        counts = (inside.sum(dim=1) + self.stack - 1) // self.stack
        return states.unflatten(1, (-1, self.stack)).flatten(2), counts


def _padded_places(
    slots: Int[Tensor, "batch seq"], counts: Int[Tensor, " clips"], width: int
) -> Int[Tensor, "batch seq"]:
    """Slots among the clips' tokens laid end to end, as places among clips that are all padded to `width`."""
    ends = counts.cumsum(dim=0)
    clips = torch.searchsorted(ends, slots.clamp_min(0), right=True)
    return (slots + (clips * width - (ends - counts)[clips])).where(slots >= 0, slots)


def _placed(x: Tensor, states: Float[Tensor, "media tokens hidden"], slots: Int[Tensor, "batch seq"]) -> Tensor:
    """`x` with the states that `slots` names in place of its own."""
    taken = F.embedding(slots.clamp_min(0), states.flatten(0, 1))
    return taken.to(x.dtype).where((slots >= 0).unsqueeze(-1), x)
