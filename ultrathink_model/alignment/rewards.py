"""The rewards of a run: one or several sources, weighted, summed, and each reported on its own."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ultrathink_model.alignment.reward import RewardModel, RewardRecord, Scorer, load_reward_model
from ultrathink_model.alignment.reward_text import CallableReward, ClassifierReward, TextScorer
from ultrathink_model.alignment.sequences import Sequences
from ultrathink_model.config.rlhf import RewardSource, RLHFConfig
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import all_reduce_sum
from ultrathink_model.errors import RewardError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One reward.

    Attributes:
        name: Of its metric.
        weight: Its factor in the sum.
        scorer: Gives a number for each response.
    """

    name: str
    weight: float
    scorer: Scorer


@dataclass
class Rewards:
    """The weighted sum of several rewards.

    Attributes:
        parts: The rewards.
        skips: Whether a response that a part has no finite number for takes the mean of the batch; else it ends the
            run.
        record: What is known of the reward model that was trained in this run; None without one.
        is_single: Whether the sum is the one reward itself, which then is not reported twice.
    """

    parts: Sequence[Part]
    skips: bool = False
    record: RewardRecord | None = None
    is_single: bool = False
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False)

    def score(self, sequences: Sequences) -> Float[Tensor, " batch"]:
        """The sum for each response.

        Raises:
            RewardError: A part raises or gives a number that is not finite, and is not skipped.
            DataError: The same of a reward model.
        """
        device, count = sequences.tokens.device, len(sequences)
        total = torch.zeros(count, device=device)
        self._add("responses", torch.tensor(float(count)))
        for part in self.parts:
            scores = self._scores(part, sequences).to(device, torch.float32)
            finite = torch.isfinite(scores)
            bad = count - int(finite.sum())
            if bad:
                if not self.skips:
                    row = int((~finite).nonzero()[0])
                    raise RewardError(
                        f"rlhf.rewards: {part.name} gave {float(scores[row])} for {bad} of {count} responses, such as the "
                        f"tokens {sequences.responses[row].tolist()}; mend it, or set rlhf.on_bad_reward=skip"
                    )
                scores = scores.where(finite, scores[finite].mean() if bad < count else torch.zeros_like(scores[0]))
            total += part.weight * scores
            self._add(part.name, scores.sum())
            self._add("bad", torch.tensor(float(bad)))
        return total

    def pop_parts(self) -> dict[str, float]:
        """Mean of each part over the responses of all ranks since the last call, as metrics; every rank calls it."""
        if self.is_single or not self._sums:
            self._sums.clear()
            return {}
        names = ["responses", "bad", *(part.name for part in self.parts)]
        sums = all_reduce_sum(torch.stack([self._sums[name].double().cpu() for name in names])).tolist()
        self._sums.clear()
        responses, bad, *totals = sums
        means = {f"rlhf/reward/{part.name}": total / responses for part, total in zip(self.parts, totals, strict=True)}
        return {**means, "rlhf/bad_rewards": bad}

    def _scores(self, part: Part, sequences: Sequences) -> Tensor:
        try:
            return part.scorer.score(sequences)
        except RewardError as error:
            if not self.skips:
                raise
            logger.warning("%s; its responses are skipped", error)
            return torch.full((len(sequences),), torch.nan)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def make_rewards(rlhf: RLHFConfig, learnt: RewardModel | None, tokenizer: Tokenizer, device: torch.device) -> Rewards:
    """What `rlhf.rewards` names, or the learnt reward model alone.

    Args:
        rlhf: The section.
        learnt: The reward model of the run's preference pairs, where one is needed.
        tokenizer: Makes texts of responses.
        device: Where models compute.

    Raises:
        CheckpointError: A folder holds no such model.
        ConfigError: A callable cannot be imported.
    """
    record = None if learnt is None else learnt.record
    if rlhf.rewards is None:
        assert learnt is not None, "the caller has trained it"
        return Rewards([Part("preferences", 1.0, learnt)], record=record, is_single=True)
    parts = [Part(reward.name, reward.weight, _scorer(reward, learnt, tokenizer, device)) for reward in rlhf.rewards]
    return Rewards(parts, skips=rlhf.on_bad_reward == "skip", record=record)


def _scorer(reward: RewardSource, learnt: RewardModel | None, tokenizer: Tokenizer, device: torch.device) -> Scorer:
    if reward.kind == "preferences":
        assert learnt is not None, "needs_reward_model says so"
        return learnt
    assert reward.source is not None, "the config asks for it"
    if reward.kind == "model":
        return load_reward_model(Path(reward.source), device)
    judge = (
        CallableReward(reward.name, reward.source)
        if reward.kind == "callable"
        else ClassifierReward(f"rlhf.rewards: {reward.name}", Path(reward.source), reward.label, device)
    )
    return TextScorer(judge, tokenizer)
