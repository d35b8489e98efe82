"""What happens to a bad step, one with a gradient that is not finite or a loss spike: nothing moves, and it counts."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ultrathink_model.distributed.interface import Strategy
from ultrathink_model.distributed.single import SingleStrategy
from ultrathink_model.errors import UltrathinkError
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.training.checkpoint import RunPosition
from ultrathink_model.training.loss_scaler import LossScaler
from ultrathink_model.training.spikes import SpikeDetector


class TrainingDivergedError(UltrathinkError):
    """More bad steps in a row than the config allows: the run goes back to a checkpoint, or ends."""


class StepGuard:
    """Takes optimizer steps, and skips the bad ones.

    The verdict is the norm of the whole gradient, which every rank has alike, and which a loss that is not finite
    spoils too; and, where `training.spike_deviations` asks for it, the loss over all ranks. On a GPU it stays there: the optimizer is told by a tensor to change nothing, the counts are kept in
    tensors, and `read_counts` alone waits for the device.
    """

    def __init__(
        self,
        strategy: Strategy,
        scaler: LossScaler | None,
        max_bad_steps: int,
        position: RunPosition,
        spikes: SpikeDetector | None = None,
    ) -> None:
        self._strategy = strategy
        self._scaler = scaler
        self._spikes = spikes
        self._max_bad_steps = max_bad_steps
        self._position = position
        self._model = strategy.unwrapped
        # Where the optimizer runs: in host memory when the state is offloaded to it.
        device = next(strategy.unwrapped.parameters()).device
        # DeepSpeed's engine takes no mask, and waits for its own verdict anyway.
        self._masks = device.type == "cuda" and isinstance(strategy, SingleStrategy)
        # All bad steps, those in a row up to now, and the longest row since the counts were read.
        self._counts = torch.tensor([position.bad_steps, position.bad_steps_in_row, 0], device=device)

    def step(self, norm: Float[Tensor, ""], loss: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Moves the weights, unless the step is bad.

        Args:
            norm: The norm of the whole gradient.
            loss: The mean loss over this rank's tokens, or over all ranks' where spikes are looked for.

        Returns:
            Whether the step was bad.
        """
        device = self._counts.device
        overflows = ~torch.isfinite(norm.to(device))
        bad = overflows
        if self._spikes is not None:
            bad = overflows | self._spikes.is_spike(loss).to(device)
            self._spikes.note(loss, bad.to(loss.device))
        if self._masks:
            self._strategy.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self._strategy.step()
        elif bad:
            self._strategy.skip_step()
        else:
            self._strategy.step()
        if self._scaler is not None:
            self._scaler.update(overflows)
        self._end_model_step(bad)
        total, in_row, longest = self._counts
        in_row = torch.where(bad, in_row + 1, 0)
        self._counts = torch.stack([total + bad, in_row, torch.maximum(longest, in_row)])
        if not self._counts.is_cuda:
            self.read_counts()
        return bad

    def read_counts(self) -> None:
        """Brings the counts into the run's position.

        Raises:
            TrainingDivergedError: More bad steps came in a row than `training.max_bad_steps` allows.
        """
        total, in_row, longest = self._counts.tolist()
        self._position.bad_steps, self._position.bad_steps_in_row = total, in_row
        if longest > self._max_bad_steps:
            raise TrainingDivergedError(
                f"{longest} steps in a row up to step {self._position.step} had a loss or gradient that is not finite"
                f"{' or a loss spike' if self._spikes else ''}, and training.max_bad_steps={self._max_bad_steps} allows "
                f"no more, with {self._position.rollbacks} rollbacks behind it; lower training.learning_rate, "
                "lengthen training.warmup_steps, set training.gradient_clipping, or under fp16 take "
                "training.amp_dtype=bf16"
            )
        self._counts[2] = 0

    def _end_model_step(self, bad: Tensor) -> None:
        """Lets the model's routing follow the step, unless the step was bad."""
        assert isinstance(self._model, Transformer)
        before = [buffer.clone() for buffer in self._model.buffers()]
        self._model.end_step(self._strategy.context.sum_over_data)
        for buffer, kept in zip(self._model.buffers(), before, strict=True):
            buffer.copy_(torch.where(bad, kept, buffer))
