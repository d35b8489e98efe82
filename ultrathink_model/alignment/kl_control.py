"""The weight of the KL penalty, fixed or moved so that the policy stays near its reference."""

from dataclasses import dataclass

from ultrathink_model.config.rlhf import RLHFConfig

# The controller aims below the bound, so that the noise of one round does not carry the policy over it.
AIM = 0.75
LARGEST_ERROR = 0.2


@dataclass
class KLControl:
    """The KL weight and its proportional control in log space (Ziegler et al. 2019, arXiv 1909.08593, §2.2).

    After each round: error = clip(KL / aim - 1, ±0.2), weight ← weight · (1 + error · rollouts / horizon). Ours aims at
    three quarters of `rlhf.target_kl`, which is a bound here and not a set point.

    Attributes:
        weight: Of one nat of KL, in units of reward.
        aim: KL in nats per response.
        horizon: Rollouts; infinite where the weight is fixed.
    """

    weight: float
    aim: float
    horizon: float

    @classmethod
    def from_config(cls, rlhf: RLHFConfig) -> "KLControl":
        """The control that `rlhf.kl_weight`, `adaptive_kl`, `target_kl` and `kl_horizon` ask for."""
        return cls(rlhf.kl_weight, AIM * rlhf.target_kl, rlhf.kl_horizon if rlhf.adaptive_kl else float("inf"))

    def update(self, kl: float, rollouts: int) -> None:
        """Moves the weight after a round.

        Args:
            kl: Measured KL in nats per response.
            rollouts: Responses of the round, over all ranks.
        """
        error = min(max(kl / self.aim - 1, -LARGEST_ERROR), LARGEST_ERROR)
        self.weight *= max(1 + error * rollouts / self.horizon, 0.5)
