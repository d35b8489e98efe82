"""Images and sounds that a message shows to the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.errors import ConfigError
from ultrathink_model.media.audio import load_audio
from ultrathink_model.media.image import load_image
from ultrathink_model.media.placeholders import KINDS, PLACEHOLDERS, Kind
from ultrathink_model.media.source import MediaSource


class Message(TypedDict):
    """A turn of a conversation.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: The text, with `<image>` or `<audio>` for each medium.
        images: In the order of their placeholders.
        audio: The same for sounds.
    """

    role: str
    content: str
    images: NotRequired[list[MediaSource]]
    audio: NotRequired[list[MediaSource]]


@dataclass
class Shown:
    """What goes with the message that is written next.

    Args:
        options: Sizes that the media must have; None for a model without encoders, to which nothing can be shown.
    """

    options: MultimodalConfig | None
    media: dict[Kind, list[MediaSource]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, kind: Kind, source: MediaSource) -> None:
        """Takes a medium once it has been read.

        Raises:
            ConfigError: The model has no encoders.
            MediaError: It cannot be read.
        """
        if self.options is None:
            raise ConfigError(
                "this model takes text alone; one that was trained with advanced.enable_multimodal=true takes images and "
                "sounds."
            )
        (load_image if kind == "image" else load_audio)(source, self.options)
        self.media[kind].append(source)

    def message(self, text: str) -> Message:
        """The message with what it shows; placeholders that the text lacks stand before it.

        Raises:
            ConfigError: The text has more placeholders than there are media.
        """
        message = Message(role="user", content=text)
        if self.options is None:
            return message
        message["content"] = " ".join([*self._missing(text), text])
        message["images"], message["audio"] = self.media["image"], self.media["audio"]
        self.media = {kind: [] for kind in KINDS}
        return message

    def _missing(self, text: str) -> Sequence[str]:
        missing: list[str] = []
        for kind, sources in self.media.items():
            placeholder = PLACEHOLDERS[kind]
            named = text.count(placeholder)
            if named > len(sources):
                raise ConfigError(
                    f"the message has {named} times {placeholder}, and {len(sources)} of that kind go with it; each stands "
                    "for one."
                )
            missing += [placeholder] * (len(sources) - named)
        return missing
