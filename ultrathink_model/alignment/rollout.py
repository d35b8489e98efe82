"""Rollouts: responses that the policy draws, with what policy, reference and reward model say of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.objectives import exact_kl_and_entropy
from ultrathink_model.alignment.precision import in_run_precision
from ultrathink_model.alignment.reward import Scorer
from ultrathink_model.alignment.sequences import Sequences, pad_prompts, response_states
from ultrathink_model.config.rlhf import RLHFConfig
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.models.generation import generate
from ultrathink_model.models.transformer import Transformer


@dataclass(frozen=True)
class Rollout:
    """One rank's responses of a round.

    Attributes:
        sequences: Prompts with the drawn responses.
        scores: Reward of each response, without any KL, (batch,).
        logprobs: Of the drawn tokens, by the same forward that the update uses, (batch, response).
        reference_logprobs: The same under the frozen reference.
        values: What the value head expects at each token; zeros without a head.
        kl: KL to the reference in nats of each response, (batch,).
        entropies: Of the policy's distribution at each token, in nats.
    """

    sequences: Sequences
    scores: Float[Tensor, " batch"]
    logprobs: Float[Tensor, "batch response"]
    reference_logprobs: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"]
    kl: Float[Tensor, " batch"]
    entropies: Float[Tensor, "batch response"]


def draw_responses(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    rlhf: RLHFConfig,
    manifest: DataManifest,
    generator: torch.Generator,
    batch_size: int,
) -> Sequences:
    """A response of up to `rlhf.response_tokens` tokens to each prompt, drawn `batch_size` at a time.

    A response ends with the end-of-text token.
    """
    device = model.output_weight.device
    tokens, mask = pad_prompts(prompts, manifest.pad_id, device)
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        prompt_mask = None if mask is None else mask[rows]
        drawn = generate(
            model,
            tokens[rows],
            attention_mask=prompt_mask,
            max_new_tokens=rlhf.response_tokens,
            temperature=rlhf.temperature,
            top_p=rlhf.top_p,
            stop_token_ids=(manifest.eos_id,),
            pad_token_id=manifest.pad_id,
            generator=generator,
        )
        parts.append((drawn.tokens, drawn.mask))
    responses, response_mask = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return Sequences(torch.cat([tokens, responses], 1), mask, response_mask)


@torch.no_grad()
def examine(
    sequences: Sequences,
    learner: Learner,
    reference: Transformer,
    scorer: Scorer,
    rlhf: RLHFConfig,
    batch_size: int,
) -> Rollout:
    """What the three models say of drawn responses, `batch_size` at a time.

    Log-probabilities are computed anew, not taken from generation: with key-value caches and truncation by
    `rlhf.top_p` those are not the numbers that the update compares itself with.

    Raises:
        DataError: A score is not a finite number.
    """
    reference_forward = in_run_precision(reference.config, reference, sequences.tokens.device)
    parts = []
    for start in range(0, len(sequences), batch_size):
        rows = sequences.select(slice(start, start + batch_size))
        logits, hidden = response_states(learner.forward, rows, rlhf.temperature)
        reference_logits, _ = response_states(reference_forward, rows, rlhf.temperature)
        values = torch.zeros_like(hidden[..., 0]) if learner.head is None else learner.head(hidden)
        every, known = logits.log_softmax(-1), reference_logits.log_softmax(-1)
        kl, entropies = exact_kl_and_entropy(every, known)
        drawn = rows.responses.unsqueeze(-1)
        parts.append(
            (
                scorer.score(rows),
                every.gather(-1, drawn).squeeze(-1),
                known.gather(-1, drawn).squeeze(-1),
                values,
                (kl * rows.response_mask).sum(1),
                entropies,
            )
        )
    return Rollout(sequences, *(torch.cat(list(part)) for part in zip(*parts, strict=True)))
