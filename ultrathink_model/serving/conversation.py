"""Conversations with a model: what was said laid out as a prompt, and the answer as it is written."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ultrathink_model.alignment.constitution import TURNS
from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.export.huggingface import CHAT_TEMPLATE, has_chat_template
from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.media.placeholders import MEDIA_TOKENS
from ultrathink_model.models.generation import generation_steps
from ultrathink_model.models.guard import Guard
from ultrathink_model.models.hf import load_model
from ultrathink_model.models.hf_config import processor_config
from ultrathink_model.models.tokenizer_files import special_ids
from ultrathink_model.serving.shown import Message

REFUSAL = " I would rather not go on with this."

Messages = Sequence[Message]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: Most tokens of an answer; at most half of the model's length, so that a question fits before it.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Probability mass that tokens are drawn from.
        seed: Decides the draws; None draws anew each time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = None


@dataclass(frozen=True)
class Piece:
    """A part of an answer; `guarded` once the guard has taken the word."""

    text: str
    guarded: bool = False


@dataclass
class Conversation:
    """A model that answers messages.

    Args:
        folder: The model's folder.
        sampling: How it answers.
        guard_threshold: Probability of harm above which the guard takes the word; None leaves the guard out. A model
            without a harm head has none.
        device: Where it computes.

    Raises:
        CheckpointError: The folder holds no model.
    """

    folder: Path
    sampling: Sampling = field(default_factory=Sampling)
    guard_threshold: float | None = 0.5
    device: str = "cpu"

    def __post_init__(self) -> None:
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - takes seconds

        self.model = load_model(self.folder, self.device).eval()
        # Not AutoTokenizer: of a folder with modelling code that asks on the terminal whether to run it.
        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(self.folder)
        self._has_own_template = has_chat_template(self.folder)
        ids = special_ids(self.folder)
        self._eos, self._pad = ids.get("eos_token_id"), ids.get("pad_token_id", 0)
        self._generator = torch.Generator()
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.sampling.seed)

    @property
    def has_guard(self) -> bool:
        """Whether answers are watched."""
        return self.model.harm_head is not None and self.guard_threshold is not None

    @property
    def media_options(self) -> MultimodalConfig | None:
        """Sizes of the images and sounds that the model takes; None where it takes none."""
        return None if self.model.media_encoder is None else self.model.config.multimodal

    def answer(self, messages: Messages) -> Iterator[Piece]:
        """What the model says next, piece by piece, each whole characters.

        Args:
            messages: Where they are too long for the model, the oldest are left out, and of a single one its beginning.
        """
        longest = self.model.config.model.max_seq_length
        new_tokens = min(self.sampling.max_new_tokens, longest // 2)
        prompt, media = self._prompt(messages, longest - new_tokens)
        pieces = self._written(prompt, media, new_tokens)
        # A model of ours may go on with the other's turn; a template with tokens of its own has one that ends a turn.
        yield from pieces if self._has_foreign_template else cut_at(pieces, [f"\n{name}" for name in TURNS])

    @property
    def _has_foreign_template(self) -> bool:
        return self._has_own_template and self._tokenizer.chat_template != CHAT_TEMPLATE

    def _prompt(self, messages: Messages, room: int) -> tuple[Int[Tensor, "1 prompt"], MediaBatch | None]:
        kept = list(messages)
        while True:
            tokens, media = self._read(kept)
            if tokens.shape[1] <= room or len(kept) == 1:
                cut = None if media is None else media.with_slots(lambda slots: slots[:, -room:])
                return tokens[:, -room:], cut
            del kept[0]

    def _read(self, messages: Messages) -> tuple[Int[Tensor, "1 prompt"], MediaBatch | None]:
        """The tokens of messages, and what those show."""
        text = self._laid_out(messages)
        images = [image for message in messages for image in message.get("images", ())]
        sounds = [sound for message in messages for sound in message.get("audio", ())]
        if not images and not sounds:
            return torch.tensor([self._tokenizer(text, add_special_tokens=False).input_ids]), None
        from ultrathink_model.models.modeling_ultrathink import make_media  # noqa: PLC0415 - imports transformers
        from ultrathink_model.models.processing_ultrathink import UltrathinkProcessor  # noqa: PLC0415

        config = self.model.config
        processor = UltrathinkProcessor(self._tokenizer, processor_config(config)["multimodal"])
        inputs = dict(processor(text, images, sounds, add_special_tokens=False))
        tokens = inputs.pop("input_ids")
        inputs.pop("attention_mask")
        placeholders = self._tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS))
        return tokens, make_media(config.multimodal, tokens, placeholders, **inputs)

    def _laid_out(self, messages: Messages) -> str:
        template = None if self._has_own_template else CHAT_TEMPLATE
        text: str = self._tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, tokenize=False
        )
        return text

    def _written(self, prompt: Int[Tensor, "1 prompt"], media: MediaBatch | None, new_tokens: int) -> Iterator[Piece]:
        from tokenizers.decoders import DecodeStream  # noqa: PLC0415

        decoded = DecodeStream(skip_special_tokens=True)
        steps = generation_steps(
            self.model,
            prompt.to(self.device),
            max_new_tokens=new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            stop_token_ids=[] if self._eos is None else [self._eos],
            pad_token_id=self._pad,
            generator=self._generator,
            guard=self._guard(),
            media=None if media is None else media.to(self.device),
        )
        for new in steps:
            if not new.active[0]:
                return
            text = decoded.step(self._tokenizer.backend_tokenizer, int(new.tokens[0]))
            if text:
                yield Piece(text, new.guarded is not None and bool(new.guarded[0]))

    def _guard(self) -> Guard | None:
        if not self.has_guard:
            return None
        assert self.guard_threshold is not None
        redirect = self._tokenizer(REFUSAL, add_special_tokens=False).input_ids
        return Guard(threshold=self.guard_threshold, redirect=redirect)


def cut_at(pieces: Iterable[Piece], marks: Sequence[str]) -> Iterator[Piece]:
    """The pieces up to the first of the marks; what may yet become one is held back."""
    held, guarded = "", False
    for piece in pieces:
        held, guarded = held + piece.text, piece.guarded
        places = [held.find(mark) for mark in marks if mark in held]
        if places:
            yield Piece(held[: min(places)], guarded)
            return
        waiting = max(
            (size for mark in marks for size in range(1, len(mark)) if held.endswith(mark[:size])),
            default=0,
        )
        ready, held = held[: len(held) - waiting], held[len(held) - waiting :]
        if ready:
            yield Piece(ready, guarded)
    if held:
        yield Piece(held, guarded)
