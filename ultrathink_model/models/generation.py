"""Generation: one token after the other, drawn from what the model predicts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.models.guard import Guard, GuardedRows
from ultrathink_model.models.kv_cache import KVCache
from ultrathink_model.models.transformer import Transformer


@dataclass(frozen=True)
class Generation:
    """What was generated after each prompt.

    Attributes:
        tokens: The new tokens; the padding token after a row's stop token.
        logprobs: Log-probability in nats of each token under the temperature-scaled distribution before any
            truncation (greedy: at temperature 1); 0 where `mask` is False.
        mask: True up to and including the stop token.
        guarded: True for the rows that a guard ended; None without a guard.
    """

    tokens: Int[Tensor, "batch new"]
    logprobs: Float[Tensor, "batch new"]
    mask: Bool[Tensor, "batch new"]
    guarded: Bool[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class NewTokens:
    """One new token of every row; `active` is False for rows that had ended before it.

    `guarded` is True for rows that a guard has taken over or ended; None without a guard.
    """

    tokens: Int[Tensor, " batch"]
    logprobs: Float[Tensor, " batch"]
    active: Bool[Tensor, " batch"]
    guarded: Bool[Tensor, " batch"] | None = None


def generate(
    model: Transformer,
    prompts: Int[Tensor, "batch prompt"],
    *,
    attention_mask: Bool[Tensor, "batch prompt"] | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    guard: Guard | None = None,
    media: MediaBatch | None = None,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens.

    The model is put in evaluation mode and left in the mode it was in.

    Args:
        model: The model.
        prompts: Tokens, each row at least one; shorter prompts are padded on the left.
        attention_mask: False on the left padding; None where no prompt is padded.
        max_new_tokens: Tokens after which every row ends.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Tokens are drawn from the most likely ones that together hold this probability (Holtzman et al. 2019,
            arXiv 1904.09751).
        stop_token_ids: A row ends with the first of these.
        pad_token_id: Fills a row after its stop token.
        generator: Source of the draws, one uniform number a row and token; on any device.
        use_cache: Keep keys and values between tokens; False computes every token from the whole text.
        guard: Ends a row, or writes its own words there, once the harm head finds the text harmful; the prompt counts.
            What it writes has log-probability 0.
        media: Images and sounds of the prompts, and the tokens of `prompts` that stand for them.

    Raises:
        ConfigError: There is a guard, and the model has no harm head.
    """
    batch, device = prompts.shape[0], prompts.device
    tokens = torch.full((batch, max_new_tokens), pad_token_id, dtype=prompts.dtype, device=device)
    logprobs = torch.zeros(batch, max_new_tokens, device=device)
    mask = torch.zeros(batch, max_new_tokens, dtype=torch.bool, device=device)
    steps = generation_steps(
        model,
        prompts,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_token_ids=stop_token_ids,
        pad_token_id=pad_token_id,
        generator=generator,
        use_cache=use_cache,
        guard=guard,
        media=media,
    )
    guarded = None
    for column, new in enumerate(steps):
        tokens[:, column], logprobs[:, column], mask[:, column] = new.tokens, new.logprobs, new.active
        guarded = new.guarded
    return Generation(tokens, logprobs, mask, guarded)


@torch.no_grad()
def generation_steps(
    model: Transformer,
    prompts: Int[Tensor, "batch prompt"],
    *,
    attention_mask: Bool[Tensor, "batch prompt"] | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    guard: Guard | None = None,
    media: MediaBatch | None = None,
) -> Iterator[NewTokens]:
    """The tokens of `generate` as they come, for a reader who does not want to wait; same arguments."""
    assert temperature >= 0, f"{temperature=} makes no distribution"
    assert 0 < top_p <= 1, f"{top_p=} is no share of a distribution"
    active = torch.ones(prompts.shape[0], dtype=torch.bool, device=prompts.device)
    stops = torch.tensor(stop_token_ids, dtype=prompts.dtype, device=prompts.device)
    text = _GrowingText(model, prompts.shape[1] + max_new_tokens, use_cache, media)
    watched = None if guard is None else GuardedRows(model, guard, prompts)
    was_training = model.training
    model.eval()
    try:
        tokens, valid = prompts, attention_mask
        for _ in range(max_new_tokens):
            hidden = text.extend(tokens, valid)
            logits = F.linear(hidden, model.output_weight).float()
            drawn, logprobs = choose_tokens(logits, temperature, top_p, generator)
            if watched is not None:
                drawn, logprobs, active = watched.step(hidden, drawn, logprobs, active)
            drawn = drawn.where(active, pad_token_id)
            yield NewTokens(drawn, logprobs.where(active, 0.0), active, None if watched is None else watched.rows)
            if watched is not None and not active.any():
                return
            if stop_token_ids:
                active = active & ~torch.isin(drawn, stops)
                if not active.any():
                    return
            tokens, valid = drawn.unsqueeze(1), None
    finally:
        model.train(was_training)


def choose_tokens(
    logits: Float[Tensor, "batch vocab"],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Draws a token for each row, with its log-probability under the distribution before truncation."""
    if temperature == 0:
        drawn = logits.argmax(dim=-1, keepdim=True)
        return drawn.squeeze(1), F.log_softmax(logits, dim=-1).gather(1, drawn).squeeze(1)
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    weights = logprobs.exp() if top_p == 1 else _nucleus(logprobs.exp(), top_p)
    drawn = _draw(weights, generator)
    return drawn.squeeze(1), logprobs.gather(1, drawn).squeeze(1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Sets to zero all but the fewest most likely tokens whose probabilities reach `top_p`."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(1, order, ordered.where(before < top_p, 0.0))


def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index of each row, (batch, 1), with probability in proportion to its weight.

    The inverse of the cumulated weights at a uniform number: a third of the time of `torch.multinomial`, which draws
    a number for each token of the vocabulary.
    """
    device = weights.device if generator is None else generator.device
    uniform = torch.rand(weights.shape[0], 1, generator=generator, device=device).to(weights.device)
    # In double precision a float32 number below 1 times the whole stays below the whole, so what is found has weight.
    cumulated = weights.double().cumsum(dim=-1)
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).clamp_max(weights.shape[1] - 1)


class _GrowingText:
    """Rows of text that grow at the end, and the model's state at their end."""

    def __init__(self, model: Transformer, capacity: int, use_cache: bool, media: MediaBatch | None) -> None:
        self._model = model
        self._media = media
        self._cache = KVCache(model.config, capacity) if use_cache else None
        self._tokens: Tensor | None = None
        self._valid: Tensor | None = None

    # Each length would be compiled anew: minutes for what takes seconds.
    @torch.compiler.set_stance("force_eager")
    def extend(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """Adds (batch, new) tokens; returns the last state of each row, (batch, hidden)."""
        if self._cache is not None:
            output = self._model(
                tokens,
                attention_mask=valid,
                cache=self._cache,
                start=self._cache.length,
                return_logits=False,
                # What follows the prompt is text.
                media=self._media if self._cache.length == 0 else None,
            )
            self._cache.length += tokens.shape[1]
        else:
            self._append(tokens, valid)
            output = self._model(self._tokens, attention_mask=self._valid, return_logits=False, media=self._media)
        return output.hidden[:, -1]

    def _append(self, tokens: Tensor, valid: Tensor | None) -> None:
        if self._tokens is None:
            self._tokens, self._valid = tokens, valid
            return
        self._tokens = torch.cat((self._tokens, tokens), dim=1)
        if self._media is not None:
            self._media = self._media.followed_by_text(tokens.shape[1])
        if self._valid is not None:
            self._valid = torch.cat((self._valid, torch.ones_like(tokens, dtype=torch.bool)), dim=1)
