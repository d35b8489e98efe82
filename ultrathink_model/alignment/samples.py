"""Responses to held-out prompts before and after alignment, by the model it began with and the one it made."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ultrathink_model.alignment.draws import SAMPLES, make_generator
from ultrathink_model.alignment.policy_run import Players
from ultrathink_model.alignment.rollout import draw_responses
from ultrathink_model.alignment.sequences import Sequences
from ultrathink_model.config import Config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.models.transformer import Transformer


@dataclass(frozen=True)
class HeldOutSamples:
    """Responses to prompts that neither policy nor reward model has learnt from.

    Attributes:
        samples: For the reader, as `samples.json` holds them.
        reward_before: Mean score of the first model's responses.
        reward_after: Mean score of the aligned model's responses to the same prompts.
    """

    samples: list[dict[str, str | float]]
    reward_before: float
    reward_after: float


def held_out_samples(
    config: Config, manifest: DataManifest, tokenizer: Tokenizer, players: Players, policy: Transformer
) -> HeldOutSamples:
    """Draws from both models with the same random numbers, for up to `rlhf.ppo_batch_size` prompts.

    Args:
        config: `evaluation.num_generations` is how many the reader sees.
        manifest: Prepared data.
        tokenizer: Its tokenizer.
        players: The reference, the reward model and the pairs.
        policy: The aligned model.
    """
    prompts = list({tuple(pair.prompt): None for pair in players.pairs.held_out})[: config.rlhf.ppo_batch_size]
    before, scores_before = _draw(config, manifest, players, players.reference, prompts)
    after, scores_after = _draw(config, manifest, players, policy, prompts)
    samples: list[dict[str, str | float]] = [
        {
            "prompt": tokenizer.decode(prompts[row]),
            "before": tokenizer.decode(_tokens(before, row)),
            "after": tokenizer.decode(_tokens(after, row)),
            "reward_before": float(scores_before[row]),
            "reward_after": float(scores_after[row]),
        }
        for row in range(min(config.evaluation.num_generations, len(prompts)))
    ]
    return HeldOutSamples(samples, float(scores_before.mean()), float(scores_after.mean()))


def _draw(
    config: Config, manifest: DataManifest, players: Players, model: Transformer, prompts: list[tuple[int, ...]]
) -> tuple[Sequences, Float[Tensor, " batch"]]:
    generator = make_generator(config.training.seed, SAMPLES)
    sequences = draw_responses(model, prompts, config.rlhf, manifest, generator, len(prompts))
    return sequences, players.rewards.score(sequences)


def _tokens(sequences: Sequences, row: int) -> list[int]:
    return sequences.responses[row][sequences.response_mask[row]].tolist()
