"""How fast a model generates: the wait for the first token, the time of each further one, and a batch's throughput."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ultrathink_model.models.generation import generation_steps
from ultrathink_model.models.transformer import Transformer

PROMPT_TOKENS = 32
ROUNDS = 3


def generation_speed(model: Transformer, prompt: list[int], new_tokens: int, batch_size: int) -> dict[str, float]:
    """Seconds and tokens a second of greedy generation with the cache, after a round that is not counted.

    `eval/generation/first_token_seconds` and `token_seconds` are for one text, medians over rounds and tokens;
    `tokens_per_second` is a batch's, all its rows together, the first token's wait included, with its standard error.

    Args:
        model: The model.
        prompt: Tokens that it goes on from, repeated or cut to a common length.
        new_tokens: Tokens that are generated in a round; at least one.
        batch_size: Texts of the batch.
    """
    length = min(PROMPT_TOKENS, max(1, model.config.model.max_seq_length - new_tokens))
    row = (prompt * -(-length // len(prompt)))[:length]
    one = torch.tensor([row], device=model.output_weight.device)
    single = _rounds(model, one, new_tokens)
    several = [sum(steps) for steps in _rounds(model, one.repeat(batch_size, 1), new_tokens)]
    speeds = [batch_size * new_tokens / seconds for seconds in several]
    metrics = {
        "eval/generation/first_token_seconds": statistics.median(steps[0] for steps in single),
        "eval/generation/tokens_per_second": statistics.mean(speeds),
        "eval/generation/tokens_per_second_stderr": statistics.stdev(speeds) / len(speeds) ** 0.5,
    }
    later = [seconds for steps in single for seconds in steps[1:]]
    if later:
        metrics["eval/generation/token_seconds"] = statistics.median(later)
    return metrics


def _rounds(model: Transformer, prompts: Tensor, new_tokens: int) -> list[list[float]]:
    """Seconds of each new token in each counted round."""
    wait: Callable[[], None] = torch.cuda.synchronize if prompts.is_cuda else lambda: None
    rounds = []
    for _ in range(1 + ROUNDS):
        steps: list[float] = []
        began = time.perf_counter()
        for _ in generation_steps(model, prompts, max_new_tokens=new_tokens, temperature=0):
            wait()
            steps.append(time.perf_counter() - began - sum(steps))
        rounds.append(steps)
    return rounds[1:]
