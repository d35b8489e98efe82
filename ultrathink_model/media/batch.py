"""The images and sounds of a batch, and where their tokens stand."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.media.counts import FRAMES_PER_STATE
from ultrathink_model.media.placeholders import Kind

NO_SLOT = -1
# What a token stands for, in the order of its numbers.
MODALITIES = ("text", "image", "audio")


@dataclass
class MediaBatch:
    """What goes to the encoders, and which token of the sequences takes which of the outputs.

    Attributes:
        images: Normalised pixels.
        audio: Log-mel frames, each clip padded to the longest.
        audio_frames: True frames of each clip.
        image_slots: For each token -1, or image · tokens of an image + patch.
        audio_slots: For each token -1, or its place among the clips' tokens laid end to end, clip after clip, each
            with its own number of them.
    """

    images: Float[Tensor, "images 3 side side"] | None = None
    audio: Float[Tensor, "clips mel frames"] | None = None
    audio_frames: Int[Tensor, " clips"] | None = None
    image_slots: Int[Tensor, "batch seq"] | None = None
    audio_slots: Int[Tensor, "batch seq"] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MediaBatch":
        """The same media on another device."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MediaBatch":
        """The same media in page-locked memory, which a GPU reads without waiting."""
        return self.apply(lambda tensor: tensor.pin_memory())

    def kinds(self) -> list[Kind]:
        """The kinds of media that there are."""
        found: list[Kind] = [] if self.images is None else ["image"]
        return found if self.audio is None else [*found, "audio"]

    def modalities(self) -> Int[Tensor, "batch seq"] | None:
        """For each token its place in `MODALITIES`; None where there are no slots."""
        numbers = None
        for number, slots in enumerate((self.image_slots, self.audio_slots), start=1):
            if slots is not None:
                own = (slots >= 0) * number
                numbers = own if numbers is None else numbers + own
        return numbers

    def followed_by_text(self, columns: int) -> "MediaBatch":
        """The same media in rows that are so much longer."""
        return self.with_slots(lambda slots: F.pad(slots, (0, columns), value=NO_SLOT))

    def followed_by_rows(self, rows: int) -> "MediaBatch":
        """The same media in a batch with so many more rows, which have none."""
        return self.with_slots(lambda slots: F.pad(slots, (0, 0, 0, rows), value=NO_SLOT))

    def with_blanks(self, options: MultimodalConfig, sequences: Float[Tensor, "batch seq hidden"]) -> "MediaBatch":
        """The same media, and a blank one that stands nowhere of each kind that is missing.

        Args:
            options: Sizes of the media.
            sequences: What they belong to, for its shape and device.
        """
        nowhere = sequences.new_full(sequences.shape[:2], NO_SLOT, dtype=torch.int64)
        missing: dict[str, Tensor] = {}
        if self.images is None:
            side = options.image_size
            missing |= {"images": sequences.new_zeros(1, 3, side, side), "image_slots": nowhere}
        if self.audio is None:
            frames = nowhere.new_full((1,), FRAMES_PER_STATE)
            audio = sequences.new_zeros(1, options.mel_bins, FRAMES_PER_STATE)
            missing |= {"audio": audio, "audio_frames": frames, "audio_slots": nowhere}
        return replace(self, **missing)

    def with_slots(self, function: Callable[[Tensor], Tensor]) -> "MediaBatch":
        """The same media with their slots changed."""
        slots = {name: getattr(self, name) for name in ("image_slots", "audio_slots")}
        return replace(self, **{name: None if value is None else function(value) for name, value in slots.items()})

    def apply(self, function: Callable[[Tensor], Tensor]) -> "MediaBatch":
        """The same media with a function applied to each tensor."""
        return MediaBatch(**{name: None if value is None else function(value) for name, value in vars(self).items()})
