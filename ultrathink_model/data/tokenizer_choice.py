"""The choice of the tokenizer that `data.tokenizer_name` stands for."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ultrathink_model.config import Config
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.data.tokenizer_training import train_tokenizer
from ultrathink_model.media.placeholders import MEDIA_TOKENS, cut_at_placeholders

if TYPE_CHECKING:
    from ultrathink_model.data.intake import Intake

logger = logging.getLogger(__name__)

# Word counts settle long before this; it bounds the first of the two readings of a large source.
TRAINING_CHARACTERS = 2**28
TIKTOKEN_NAMES = ("cl100k_base", "gpt2")


def tokenizer_identity(config: Config) -> dict[str, object]:
    """Plain values that change when the tokenizer would: what the fingerprint covers of it."""
    name = config.data.tokenizer_name
    media: dict[str, object] = {"media": True} if config.advanced.enable_multimodal else {}
    if name == "train":
        return media | {"name": name, "vocab_size": config.model.vocab_size}
    if name in TIKTOKEN_NAMES:
        return media | {"name": name}
    return media | {"hash": Tokenizer.load(name).hash}


def choose_tokenizer(config: Config, intakes: "Sequence[Intake]") -> Tokenizer:
    """Trains, converts or loads the tokenizer of the config; a multimodal one gets the tokens of images and sounds.

    Raises:
        TokenizerError: There is no such tokenizer, or it cannot be had without a network.
    """
    tokenizer = _choose(config, intakes)
    return tokenizer.with_media() if config.advanced.enable_multimodal else tokenizer


def _choose(config: Config, intakes: "Sequence[Intake]") -> Tokenizer:
    name = config.data.tokenizer_name
    if name == "train":
        logger.info("training a byte-level BPE of %d ids on the training split", config.model.vocab_size)
        more_tokens = MEDIA_TOKENS if config.advanced.enable_multimodal else ()
        return train_tokenizer(_training_texts(intakes, TRAINING_CHARACTERS), config.model.vocab_size, more_tokens)
    if name in TIKTOKEN_NAMES:
        # Imported here because most runs do without tiktoken, and it takes its time.
        from ultrathink_model.data.tokenizer_tiktoken import load_tiktoken  # noqa: PLC0415

        logger.info("taking the tokenizer %s from tiktoken", name)
        return load_tiktoken(name)
    logger.info("taking the tokenizer of %s", name)
    return Tokenizer.load(name)


def _training_texts(intakes: "Sequence[Intake]", characters: int) -> Iterator[str]:
    """The training documents of all sources, of each up to a number of characters."""
    for intake in intakes:
        rest = characters
        for document in intake.documents():
            if document.split == "train" and rest > 0:
                # Placeholders become tokens of their own, from which there is nothing to learn.
                yield from cut_at_placeholders(document.text)[0] if document.media else [document.text]
                rest -= len(document.text)
                intake.train_full = rest <= 0 and intake.streaming
        if rest <= 0:
            logger.info("%s: the tokenizer learned from its first %d characters", intake.name, characters)
