"""The rounds of a policy: draw, measure, update; with the state that a resumed run goes on from."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrathink_model.alignment.draws import PROMPT_ORDER, ROLLOUT, endless_order, make_generator
from ultrathink_model.alignment.experience import Algorithm
from ultrathink_model.alignment.kl_control import KLControl
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.pairs import PairSplit
from ultrathink_model.alignment.rewards import Rewards
from ultrathink_model.alignment.rollout import Rollout, draw_responses, examine
from ultrathink_model.alignment.sequences import Sequences
from ultrathink_model.alignment.update import KLLimit, Update, update_policy
from ultrathink_model.config import Config
from ultrathink_model.data.batch import Batch
from ultrathink_model.data.loader import TrainLoader
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.safety import with_safety_rows
from ultrathink_model.distributed.context import RankContext, all_reduce_sum
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.training.checkpoint import RunPosition, load_tensors, read_rank_state
from ultrathink_model.training.guard import TrainingDivergedError
from ultrathink_model.training.rng import generator_state, restore_generators

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Players:
    """Whom a policy is trained with.

    Attributes:
        reference: The model that the policy started from, frozen.
        rewards: Score responses.
        pairs: Their training prompts are what rollouts answer.
    """

    reference: Transformer
    rewards: Rewards
    pairs: PairSplit


@dataclass(frozen=True)
class Measure:
    """What a round's rollouts show, means over the responses of all ranks.

    Attributes:
        reward: Score by the reward model, without KL.
        kl: KL to the reference, in nats per response.
        entropy: Of the next token, in nats.
        response_tokens: Tokens of a response.
        responses: Responses, over all ranks.
        reward_spread: Standard deviation of the score over the responses.
    """

    reward: float
    kl: float
    entropy: float
    response_tokens: float
    responses: int
    reward_spread: float = 0.0


class PolicyRun:
    """Rounds of an algorithm on a policy.

    Everything that is drawn depends on the seed and the round alone, so that a resumed run draws the same.

    Attributes:
        position: Rounds done, and tokens learnt from; checkpoints hold it.
        accepted_round: Rounds behind the last policy that was measured under `rlhf.target_kl`.
        accepted_measure: What it showed there.
    """

    def __init__(
        self,
        config: Config,
        context: RankContext,
        manifest: DataManifest,
        learner: Learner,
        algorithm: Algorithm[Any],
        players: Players,
        first_routing_step: int,
    ) -> None:
        self.config, self.context = config, context
        self.learner, self.players = learner, players
        self.position = RunPosition()
        self.accepted_round = 0
        self.accepted_measure = Measure(0.0, 0.0, 0.0, 0.0, 0)
        self.control = KLControl.from_config(config.rlhf)
        self._manifest, self._algorithm, self._first_routing_step = manifest, algorithm, first_routing_step
        self._accepted = _copied(learner.whole_trunk())
        self._corpus: Iterator[list[Batch]] | None = None

    @property
    def responses_per_round(self) -> int:
        """Over all ranks."""
        return self.config.rlhf.ppo_batch_size * self.config.rlhf.rlhf_steps_per_iteration

    @property
    def is_done(self) -> bool:
        """Whether all rounds are done."""
        return self.position.step >= self.config.rlhf.rlhf_iterations

    @property
    def can_return(self) -> bool:
        """Whether the algorithm holds a KL penalty that can bring the policy back."""
        return self._algorithm.controls_kl

    def draw(self) -> tuple[Rollout, Measure]:
        """The responses of the round that begins, and what they show; under the bound, the policy is accepted."""
        rlhf, context, number = self.config.rlhf, self.context, self.position.step
        own = self.responses_per_round // context.world_size
        prompts = own // self._algorithm.group_size
        train = self.players.pairs.train
        first = number * (self.responses_per_round // self._algorithm.group_size) + context.rank * prompts
        order = endless_order(first, prompts, len(train), self.config.training.seed, PROMPT_ORDER)
        repeated = [train[index].prompt for index in order for _ in range(self._algorithm.group_size)]
        generator = make_generator(self.config.training.seed, ROLLOUT, number, context.rank)
        policy = self.learner.whole_trunk()
        rollout = self.examine(
            draw_responses(policy, repeated, rlhf, self._manifest, generator, rlhf.ppo_batch_size // context.world_size)
        )
        measure = summarise(rollout)
        if measure.kl <= rlhf.target_kl:
            self.accepted_round, self.accepted_measure = number, measure
            self._accepted = _copied(policy)
        return rollout, measure

    def examine(self, sequences: Sequences) -> Rollout:
        """What policy, reference and reward model say of responses."""
        size = self.config.rlhf.ppo_minibatch_size
        return examine(sequences, self.learner, self.players.reference, self.players.rewards, self.config.rlhf, size)

    def learn(self, rollout: Rollout, measure: Measure) -> Update:
        """The updates of a round, which ends with them.

        Raises:
            TrainingDivergedError: More steps in a row than `training.max_bad_steps` had no finite gradient.
        """
        number = self.position.step
        rows = self._algorithm.prepare(rollout, self.control.weight, number * self.responses_per_round)
        update = update_policy(
            self.learner,
            self._algorithm,
            rows,
            self.config,
            number,
            KLLimit(measure.kl, self.control.aim),
            self._language_model_gradient(number),
        )
        self.learner.end_routing_step()
        self.control.update(measure.kl, measure.responses)
        self.position.step = number + 1
        self.position.tokens += round(measure.response_tokens * measure.responses)
        self._count_bad_steps(update)
        return update

    def return_to_accepted(self) -> None:
        """Puts the last policy back that was measured under `rlhf.target_kl`."""
        self.learner.load_trunk(self._accepted)

    def tensors(self) -> dict[str, Any]:
        """Every tensor of the run's state, live."""
        return {**self.learner.state_dict(), "accepted": self._accepted}

    def rank_state(self) -> dict[str, Any]:
        """What a checkpoint holds of this rank beside the tensors."""
        accepted = {"accepted_round": self.accepted_round, "accepted_measure": vars(self.accepted_measure)}
        return {**generator_state(self.context.device), "kl_weight": self.control.weight, **accepted}

    def restore(self, folder: Path, position: RunPosition) -> None:
        """Brings the run to where a checkpoint was taken.

        Raises:
            CheckpointError: Its tensors do not fit.
        """
        tensors = self.tensors()
        load_tensors(folder, tensors)
        self.learner.load_state_dict(tensors)
        self._accepted = tensors["accepted"]
        own = read_rank_state(folder, self.context.rank)
        state = own or read_rank_state(folder, 0)
        assert state is not None, "a verified checkpoint has the state of rank 0"
        if own is not None:
            restore_generators(own, self.context.device)
        self.control.weight = state["kl_weight"]
        self.accepted_round = state["accepted_round"]
        self.accepted_measure = Measure(**state["accepted_measure"])
        self.position = position.model_copy()
        logger.info("goes on after round %d of %s", position.step, folder)

    def _language_model_gradient(self, number: int) -> Callable[[], None] | None:
        """What adds the language-model gradient, in every `rlhf.rlhf_frequency`-th round."""
        rlhf = self.config.rlhf
        if not rlhf.ptx_weight or (number + 1) % rlhf.rlhf_frequency:
            return None

        def add() -> None:
            if self._corpus is None:
                rank, ranks, first = self.context.rank, self.context.world_size, number // rlhf.rlhf_frequency
                loader = TrainLoader(self._manifest, self.config, rank=rank, world_size=ranks, first_step=first)
                self._corpus = with_safety_rows(iter(loader), self._manifest, self.config, rank, ranks, first)
            tokens, _ = self.learner.add_language_model_gradient(
                next(self._corpus), rlhf.ptx_weight, self._first_routing_step + number
            )
            self.position.tokens += tokens

        return add

    def _count_bad_steps(self, update: Update) -> None:
        position, allowed = self.position, self.config.training.max_bad_steps
        position.bad_steps += update.bad_steps
        all_bad = update.bad_steps == update.steps
        position.bad_steps_in_row = position.bad_steps_in_row + update.bad_steps if all_bad else 0
        if position.bad_steps_in_row > allowed:
            raise TrainingDivergedError(
                f"{position.bad_steps_in_row} steps in a row up to round {position.step} had a gradient that is not "
                f"finite, and training.max_bad_steps={allowed} allows no more; lower rlhf.policy_learning_rate"
            )


def summarise(rollout: Rollout) -> Measure:
    """Means over the responses of all ranks."""
    mask = rollout.sequences.response_mask
    own = [
        torch.tensor(float(len(mask)), device=mask.device),
        mask.sum(),
        rollout.scores.sum(),
        rollout.scores.double().square().sum(),
        rollout.kl.sum(),
        (rollout.entropies * mask).sum(),
    ]
    sums = all_reduce_sum(torch.stack([part.double() for part in own])).tolist()
    responses, tokens, reward, squares, kl, entropy = sums
    spread = max(0.0, squares / responses - (reward / responses) ** 2) ** 0.5
    return Measure(reward / responses, kl / responses, entropy / tokens, tokens / responses, round(responses), spread)


def _copied(model: Transformer) -> dict[str, Tensor]:
    """The model's weights and buffers in host memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
