"""Prompts with their responses as one padded batch, and what a model says of each response token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ultrathink_model.models.transformer import ModelOutput

Forward = Callable[..., ModelOutput]


@dataclass(frozen=True)
class Sequences:
    """Prompts, padded on the left, each followed by its response, padded on the right.

    Padding on the right needs no attention mask: nothing that comes before it can see it.

    Attributes:
        tokens: Prompt and response, (batch, prompt + response).
        prompt_mask: False on the left padding, (batch, prompt); None where no prompt is padded.
        response_mask: True up to and including a response's last token, (batch, response).
    """

    tokens: Int[Tensor, "batch length"]
    prompt_mask: Bool[Tensor, "batch prompt"] | None
    response_mask: Bool[Tensor, "batch response"]

    def __len__(self) -> int:
        return self.tokens.size(0)

    @property
    def responses(self) -> Int[Tensor, "batch response"]:
        """The response tokens."""
        return self.tokens[:, self.prompt_length :]

    @property
    def prompt_length(self) -> int:
        """Positions before the first response token, padding included."""
        return self.tokens.size(1) - self.response_mask.size(1)

    @property
    def attention_mask(self) -> Bool[Tensor, "batch length"] | None:
        """False on the left padding; None where there is none."""
        if self.prompt_mask is None:
            return None
        return torch.cat([self.prompt_mask, torch.ones_like(self.response_mask)], 1)

    def select(self, rows: Int[Tensor, " rows"] | slice) -> "Sequences":
        """Some of the rows."""
        mask = None if self.prompt_mask is None else self.prompt_mask[rows]
        return Sequences(self.tokens[rows], mask, self.response_mask[rows])


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[Int[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"] | None]:
    """Prompts as one block, padded on the left, with its mask; no mask where all are equally long."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if bool((lengths == longest).all()):
        return tokens.to(device), None
    mask = torch.arange(longest) >= longest - lengths[:, None]
    return tokens.to(device), mask.to(device)


def make_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str,
) -> Sequences:
    """A batch from token lists; every prompt and every response holds at least one token."""
    prompt_tokens, prompt_mask = pad_prompts(prompts, pad_id, device)
    longest = max(len(response) for response in responses)
    tokens = torch.tensor([[*response, *[pad_id] * (longest - len(response))] for response in responses])
    mask = torch.arange(longest) < torch.tensor([len(response) for response in responses])[:, None]
    return Sequences(torch.cat([prompt_tokens, tokens.to(device)], 1), prompt_mask, mask.to(device))


def response_states(
    forward: Forward, sequences: Sequences, temperature: float
) -> tuple[Float[Tensor, "batch response vocab"], Float[Tensor, "batch response hidden"]]:
    """Logits of each response token, over the sampling temperature, and the hidden state they are read from.

    Args:
        forward: A model in evaluation mode. The policy is also *updated* through such a forward: in training mode the
            reasoning engine routes by rank among a row's tokens, in evaluation mode and in generation by a frozen
            threshold, and only probabilities of one and the same function make a ratio of 1 before the first update.
        sequences: Prompts with responses.
        temperature: What the responses were or would be drawn at.
    """
    first = sequences.prompt_length - 1
    mask = _without_last(sequences.attention_mask)
    output = forward(sequences.tokens[:, :-1], attention_mask=mask, logits_from=first)
    assert output.logits is not None, "a forward without labels returns logits"
    logits = output.logits.float()
    return logits if temperature == 1 else logits / temperature, output.hidden[:, first:]


def token_logprobs(
    logits: Float[Tensor, "batch response vocab"], tokens: Int[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Log-probability of each token, in nats."""
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def token_entropies(logits: Float[Tensor, "batch response vocab"]) -> Float[Tensor, "batch response"]:
    """Entropy of each next-token distribution, in nats."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def _without_last(mask: Bool[Tensor, "batch length"] | None) -> Bool[Tensor, "batch shorter"] | None:
    return None if mask is None else mask[:, :-1]
