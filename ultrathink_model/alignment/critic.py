"""The critic of Constitutional AI: whoever writes critiques and revisions, and chooses between answers."""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from ultrathink_model.alignment.constitution import cut_answer
from ultrathink_model.alignment.critic_endpoint import EndpointCritic
from ultrathink_model.alignment.critic_local import LocalCritic
from ultrathink_model.alignment.draws import CRITIC, make_generator
from ultrathink_model.alignment.sequences import pad_prompts
from ultrathink_model.config import Config
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.models.generation import generate
from ultrathink_model.models.transformer import Transformer

logger = logging.getLogger(__name__)


class Critic(Protocol):
    """Somebody who can be asked; None stands for an answer that cannot be used."""

    def write(self, texts: Sequence[str], number: int) -> list[str | None]:
        """What follows on each text.

        Args:
            texts: Texts that end where the critic is to go on.
            number: Number of the first of them, which seeds the draws.
        """
        ...

    def choose(self, texts: Sequence[str]) -> list[float | None]:
        """Probability that A, and not B, is what each text asks for."""
        ...


def make_critic(config: Config, model: Transformer, tokenizer: Tokenizer) -> Critic:
    """What `constitutional.critic` names.

    Raises:
        CheckpointError: The local critic's folder holds no model.
    """
    section = config.constitutional
    if section.critic == "endpoint":
        return EndpointCritic(section)
    if section.critic == "local":
        return LocalCritic(section, config.training.seed, model.output_weight.device)
    return SelfCritic(config, model, tokenizer)


class SelfCritic:
    """The model that is being aligned, as its own critic (Bai et al. 2022, arXiv 2212.08073).

    Args:
        config: `constitutional` says how long and how boldly it writes.
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, config: Config, model: Transformer, tokenizer: Tokenizer) -> None:
        self._section, self._seed = config.constitutional, config.training.seed
        self._model, self._tokenizer = model, tokenizer
        self._has_warned = False
        self._room = model.config.model.max_seq_length - self._section.response_tokens

    def write(self, texts: Sequence[str], number: int) -> list[str | None]:
        """What the model goes on with; see `Critic`."""
        tokenizer, section = self._tokenizer, self._section
        tokens, mask = self._prompts(texts, self._room)
        done = generate(
            self._model,
            tokens,
            attention_mask=mask,
            max_new_tokens=section.response_tokens,
            temperature=section.temperature,
            stop_token_ids=(tokenizer.eos_id,),
            pad_token_id=tokenizer.pad_id,
            generator=make_generator(self._seed, CRITIC, number),
        )
        written = [ids[kept].tolist() for ids, kept in zip(done.tokens, done.mask, strict=True)]
        return [cut_answer(tokenizer.decode(ids)) or None for ids in written]

    @torch.no_grad()
    def choose(self, texts: Sequence[str]) -> list[float | None]:
        """The share of A in what the model gives A and B as the next token; see `Critic`."""
        letters = [self._tokenizer.encode(letter)[0] for letter in "AB"]
        tokens, mask = self._prompts(texts, self._model.config.model.max_seq_length)
        logits = self._model.eval()(tokens, attention_mask=mask).logits
        assert logits is not None, "a forward without labels returns logits"
        share: list[float | None] = logits[:, -1, letters].softmax(-1)[:, 0].tolist()
        return share

    def _prompts(self, texts: Sequence[str], room: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The last tokens of each text, as many as the model can read."""
        encoded = [[self._tokenizer.bos_id, *ids] for ids in self._tokenizer.encode_batch(list(texts))]
        longest = max(map(len, encoded))
        if longest > room and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a text of %d tokens does not fit into the %d that the model can read before it answers, and loses its "
                "beginning; lower constitutional.response_tokens, or take a critic that reads more",
                longest,
                room,
            )
        return pad_prompts([ids[-room:] for ids in encoded], self._tokenizer.pad_id, self._model.output_weight.device)
