"""The update of a round: passes over its rows in minibatches, until they are done or the KL says stop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrathink_model.alignment.draws import MINIBATCHES, shuffled
from ultrathink_model.alignment.experience import Algorithm, AnyRows, Terms
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.config import Config
from ultrathink_model.distributed.context import all_reduce_sum


@dataclass(frozen=True)
class KLLimit:
    """When a round's updates stop: once the policy stands beyond `aim` and further out than the round began.

    Attributes:
        start: Measured KL of the policy that drew the rollouts, in nats per response.
        aim: What the control steers for.
    """

    start: float
    aim: float

    def is_passed(self, change: float) -> bool:
        """Whether to stop, with the KL moved by `change` since the rollout."""
        return self.start + change > max(self.aim, self.start)


@dataclass(frozen=True)
class Update:
    """What a round's updates did.

    Attributes:
        steps: Optimizer steps.
        bad_steps: Those of them that were passed over, because the gradient was not finite.
        stopped_early: Whether the KL ended them.
        means: Parts of the objective by name, means over the tokens (or pairs) of all steps and ranks.
    """

    steps: int
    bad_steps: int
    stopped_early: bool
    means: dict[str, float]


def update_policy(
    learner: Learner,
    algorithm: Algorithm[AnyRows],
    rows: AnyRows,
    config: Config,
    round_number: int,
    limit: KLLimit,
    add_language_model_gradient: Callable[[], None] | None = None,
) -> Update:
    """`rlhf.ppo_epochs` passes over this rank's rows, `rlhf.ppo_minibatch_size` over all ranks in each step.

    Args:
        learner: The policy and its value head.
        algorithm: Gives the objective of a minibatch.
        rows: This rank's rows of the round.
        config: The run's config.
        round_number: Seeds the order.
        limit: Stops the passes.
        add_language_model_gradient: Called first; the first step takes its gradient along.
    """
    context = learner.context
    size = config.rlhf.ppo_minibatch_size // context.world_size
    tally: dict[str, Tensor] = {}
    steps = bad_steps = 0
    if add_language_model_gradient is not None:
        add_language_model_gradient()
    for epoch in range(config.rlhf.ppo_epochs):
        order = shuffled(len(rows), config.training.seed, MINIBATCHES, round_number, epoch, context.rank)
        for minibatch in order.split(size):
            terms = algorithm.terms(learner, rows.select(minibatch.to(context.device)))
            count, change = _global_count_and_change(terms, len(minibatch))
            # Before the first step the change is rounding.
            if steps and change is not None and limit.is_passed(change):
                return Update(steps, bad_steps, True, _means(tally))
            learner.backward(terms.loss / count)
            bad_steps += not bool(torch.isfinite(learner.step()))
            steps += 1
            _add(tally, {**terms.sums, "count": terms.count})
    return Update(steps, bad_steps, False, _means(tally))


def _global_count_and_change(terms: Terms, responses: int) -> tuple[float, float | None]:
    """Tokens of the minibatch over all ranks, and the KL's change in nats per response."""
    change = torch.zeros_like(terms.count) if terms.kl_change is None else terms.kl_change
    own = torch.stack([terms.count, change, torch.full_like(terms.count, responses)])
    count, total, all_responses = all_reduce_sum(own).tolist()
    return count, None if terms.kl_change is None else total / all_responses


def _add(tally: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tally[name] = tally[name] + value if name in tally else value


def _means(tally: dict[str, Tensor]) -> dict[str, float]:
    if not tally:
        return {}
    names = sorted(tally)
    sums = dict(zip(names, all_reduce_sum(torch.stack([tally[name] for name in names])).tolist(), strict=True))
    count = sums.pop("count")
    return {name: total / count for name, total in sums.items()}
