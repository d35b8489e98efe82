"""Training a reward model on preference pairs, and measuring it on pairs of other prompts."""

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ultrathink_model.alignment.draws import REWARD_ORDER, shuffled
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.objectives import calibration_error, preference_loss
from ultrathink_model.alignment.pairs import PairSplit, TokenPair
from ultrathink_model.alignment.reward import RewardHead, RewardModel, RewardRecord, raw_scores
from ultrathink_model.alignment.sequences import make_sequences
from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext, all_reduce_sum
from ultrathink_model.errors import DataError
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.training.guard import TrainingDivergedError

# Share of the steps over which the learning rate rises; it then falls in a straight line to zero.
WARMUP = 0.1

logger = logging.getLogger(__name__)


class RewardTrainer:
    """Bradley and Terry's model on a copy of the language model's trunk (Ouyang et al. 2022, arXiv 2203.02155).

    The loss of a pair is -log σ(score of chosen - score of rejected - margin), times the pair's weight. Under
    `rlhf.reward_weighting: prompt` the pairs of one prompt share one pair's weight, so that a prompt with many answers
    does not outweigh the others. Pairs of one prompt come together, and an answer that stands in several of a batch is
    scored once, as section 3.5 of the paper has it: met again and again within an epoch it would be learnt by heart.

    Args:
        config: Its `rlhf.reward_*` keys.
        trunk: The language model to start from; it is copied.
        pad_id: Fills ragged rows.
        context: The ranks share each batch.

    Attributes:
        learner: The trunk with the head.
    """

    def __init__(self, config: Config, trunk: Transformer, pad_id: int, context: RankContext) -> None:
        rlhf = config.rlhf
        self._rlhf, self._seed, self._pad_id, self._context = rlhf, config.training.seed, pad_id, context
        trunk = copy.deepcopy(trunk)
        rate = rlhf.reward_learning_rate
        self._head = RewardHead(trunk.config.model.hidden_size)
        self.learner = Learner(config, context, trunk, self._head, rate, rate)

    def fit(self, split: PairSplit, after_step: Callable[[int, int, float], None], first_step: int = 0) -> RewardModel:
        """Trains on the one part of the pairs and measures on the other.

        Args:
            split: The pairs.
            after_step: Told the step, all steps and the mean loss of the step in nats.
            first_step: Steps that are done already, whose state the learner holds.

        Raises:
            TrainingDivergedError: The loss is no longer finite.
            DataError: All scores are alike, so that nothing can be learnt from them.
        """
        rlhf = self._rlhf
        weights = pair_weights(split.train, rlhf.reward_weighting)
        batch_size = min(rlhf.reward_batch_size, len(split.train))
        per_epoch = -(-len(split.train) // batch_size)
        steps = per_epoch * rlhf.reward_epochs
        order: list[int] = []
        for step in range(first_step, steps):
            epoch, part = divmod(step, per_epoch)
            if part == 0 or not order:
                order = self._order(split.train, epoch)
            rows = order[part * batch_size : (part + 1) * batch_size]
            self.learner.scale_rates(learning_rate_factor(step, steps))
            pairs = [split.train[row] for row in rows]
            after_step(step + 1, steps, self._step(pairs, [weights[row] for row in rows]))
        return self._measured(split)

    def _order(self, pairs: Sequence[TokenPair], epoch: int) -> list[int]:
        """The pairs of an epoch, prompt after prompt."""
        of_prompt: dict[tuple[int, ...], list[int]] = {}
        for row, pair in enumerate(pairs):
            of_prompt.setdefault(tuple(pair.prompt), []).append(row)
        together = list(of_prompt.values())
        order = shuffled(len(together), self._seed, REWARD_ORDER, epoch).tolist()
        return [row for prompt in order for row in together[prompt]]

    def _step(self, pairs: Sequence[TokenPair], weights: Sequence[float]) -> float:
        share = slice(self._context.rank, None, self._context.world_size)
        # A rank that gets no pair of a last, small batch still takes part in the exchange of gradients.
        own, own_weights = (pairs[share], weights[share]) if pairs[share] else (pairs[:1], [0.0])
        chosen, rejected = self._scores(own).chunk(2)
        margin = torch.tensor([pair.margin for pair in own], device=chosen.device)
        losses = preference_loss(chosen, rejected, margin) * torch.tensor(own_weights, device=chosen.device)
        loss = losses.sum() / len(pairs)
        self.learner.backward(loss)
        norm = self.learner.step()
        total = float(all_reduce_sum(loss.detach()))
        if not (torch.isfinite(norm) and math.isfinite(total)):
            raise TrainingDivergedError(
                f"the reward model's loss is {total:g} and its gradient's norm {float(norm):g}: it diverges under "
                f"rlhf.reward_learning_rate={self._rlhf.reward_learning_rate:g}; lower it"
            )
        return total

    def _scores(self, pairs: Sequence[TokenPair]) -> Float[Tensor, " sides"]:
        """Raw scores of the chosen sides, then of the rejected ones."""
        sides = [(tuple(pair.prompt), tuple(pair.chosen)) for pair in pairs]
        sides += [(tuple(pair.prompt), tuple(pair.rejected)) for pair in pairs]
        rows = {side: row for row, side in enumerate(dict.fromkeys(sides))}
        prompts, answers = ([list(side[part]) for side in rows] for part in (0, 1))
        sequences = make_sequences(prompts, answers, self._pad_id, self._context.device)
        scores = raw_scores(self.learner.forward, self._head, sequences, self._rlhf.reward_pooling)
        return scores[torch.tensor([rows[side] for side in sides], device=scores.device)]

    @torch.no_grad()
    def _scores_in_batches(self, pairs: Sequence[TokenPair]) -> Float[Tensor, "sides pairs"]:
        """Raw scores of this rank's share of the pairs, chosen above rejected."""
        own = pairs[self._context.rank :: self._context.world_size]
        size = self._rlhf.reward_batch_size
        parts = [self._scores(own[start : start + size]).view(2, -1) for start in range(0, len(own), size)]
        return torch.cat(parts, 1).cpu() if parts else torch.zeros(2, 0)

    def _measured(self, split: PairSplit) -> RewardModel:
        mean, spread = self._normalisation(self._scores_in_batches(split.train))
        chosen, rejected = self._scores_in_batches(split.held_out)
        lengths = [len(pair.chosen) - len(pair.rejected) for pair in split.held_out]
        gaps = self._gathered(chosen - rejected, len(split.held_out))
        right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
        by_prompt = torch.tensor(pair_weights(split.held_out, "prompt"), dtype=torch.float64)
        record = RewardRecord(
            pooling=self._rlhf.reward_pooling,
            mean=mean,
            spread=spread,
            accuracy=float(right.mean()),
            loss=float(-torch.nn.functional.logsigmoid(gaps).mean()),
            prompt_accuracy=float((right * by_prompt).mean()),
            calibration_error=calibration_error(gaps),
            length_accuracy=sum(0.5 + 0.5 * ((length > 0) - (length < 0)) for length in lengths) / len(lengths),
            held_out_pairs=len(split.held_out),
        )
        logger.info(
            "reward model: ranks %.1f%% of %d held-out pairs right (length alone %.1f%%), loss %.3f nats (chance 0.693), "
            "calibration error %.3f",
            100 * record.accuracy,
            record.held_out_pairs,
            100 * record.length_accuracy,
            record.loss,
            record.calibration_error,
        )
        trunk = self.learner.whole_trunk()
        return RewardModel(trunk.eval().requires_grad_(False), self._head.requires_grad_(False), record)

    def _gathered(self, own: Float[Tensor, " share"], count: int) -> Float[Tensor, " pairs"]:
        """The numbers of all ranks in the order of the pairs."""
        every = torch.zeros(count, dtype=torch.float64)
        every[self._context.rank :: self._context.world_size] = own.double()
        return all_reduce_sum(every)

    def _normalisation(self, scores: Float[Tensor, "sides pairs"]) -> tuple[float, float]:
        """Mean and standard deviation over the ranks."""
        values = scores.double().flatten()
        moments = torch.tensor([values.numel(), values.sum(), values.square().sum()], dtype=torch.float64)
        count, total, squares = all_reduce_sum(moments).tolist()
        variance = squares / count - (total / count) ** 2
        if not variance > 1e-12:
            raise DataError(
                f"the reward model gives all {count:g} training responses the same score (variance {variance:g}); "
                "raise rlhf.reward_learning_rate or rlhf.reward_epochs, or give pairs that differ"
            )
        return total / count, variance**0.5


def pair_weights(pairs: Sequence[TokenPair], weighting: Literal["pair", "prompt"]) -> list[float]:
    """What each pair counts, with a mean of 1: its own weight, under `prompt` over the pairs of its prompt.

    Raises:
        DataError: All weights are zero.
    """
    together = Counter(tuple(pair.prompt) for pair in pairs)
    weights = [pair.weight / (together[tuple(pair.prompt)] if weighting == "prompt" else 1) for pair in pairs]
    total = sum(weights)
    if total <= 0:
        raise DataError(f"all {len(pairs)} preference pairs have the weight 0; give at least one a weight above 0")
    return [weight * len(pairs) / total for weight in weights]


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step (from 0): a rise over the first tenth, then a fall to zero."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))
