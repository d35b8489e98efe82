"""The training loop."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.data import Batch
from ultrathink_model.distributed.context import all_reduce_sum
from ultrathink_model.distributed.interface import Strategy
from ultrathink_model.models.transformer import ModelOutput, Transformer
from ultrathink_model.training.callbacks.callback import Callback
from ultrathink_model.training.checkpoint import RunPosition
from ultrathink_model.training.guard import StepGuard
from ultrathink_model.training.length import RunLength
from ultrathink_model.training.loss_scaler import LossScaler
from ultrathink_model.training.schedule import learning_rate_factor, set_learning_rate
from ultrathink_model.training.signals import StopSignals

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Ending = Literal["finished", "stopped"]


@dataclass
class StepRecord:
    """What one step measured; tensors stay on the device, and sums are this rank's, until somebody asks.

    Attributes:
        tokens: Tokens of the step over all ranks.
        learning_rate: AdamW's rate of the step.
        loss_sum: Cross-entropy of this rank's tokens, in nats.
        aux_sums: Auxiliary losses of this rank's tokens, by name.
        gradient_norm: Norm of the whole gradient before clipping.
    """

    tokens: int
    learning_rate: float
    loss_sum: Float[Tensor, ""]
    aux_sums: dict[str, Tensor] = field(default_factory=dict)
    gradient_norm: Float[Tensor, ""] | None = None


class Trainer:
    """Trains a prepared model until a bound of the config is met or a signal comes.

    Attributes:
        position: How far the run is; checkpoints hold it.
        record: What the last step measured; None before the first.
        callbacks: Called after each step, in this order.
    """

    def __init__(
        self,
        config: Config,
        strategy: Strategy,
        batches: Iterator[list[Batch]],
        length: RunLength,
        position: RunPosition,
        signals: StopSignals,
        callbacks: Sequence[Callback],
    ) -> None:
        assert isinstance(strategy.unwrapped, Transformer)
        self.config, self.strategy, self.length, self.position = config, strategy, length, position
        self.model: Transformer = strategy.unwrapped
        self.callbacks = callbacks
        self.record: StepRecord | None = None
        needs_scale = config.training.use_amp and config.training.amp_dtype == "fp16"
        self.scaler = LossScaler(next(self.model.parameters()).device) if needs_scale else None
        self._batches, self._signals = batches, signals
        self._paused = 0.0

    def fit(self) -> Ending:
        """Trains; `stopped` when a signal ended it before its bounds."""
        self._guard = StepGuard(self.strategy, self.scaler, self.config.training.max_bad_steps, self.position)
        self._started = time.perf_counter() - self.position.seconds
        self.strategy.model.train()
        for callback in self.callbacks:
            callback.on_train_begin(self)
        ending: Ending = "finished"
        while not self.is_last_step:
            micro_batches = next(self._batches)
            tokens, is_signalled, is_late = self._agree(micro_batches)
            if is_signalled or is_late:
                ending = "stopped" if is_signalled else "finished"
                break
            self._train_step(micro_batches, tokens)
            for callback in self.callbacks:
                callback.on_step_end(self)
        for callback in self.callbacks:
            callback.on_finish(self) if ending == "finished" else callback.on_stop(self)
        return "stopped" if self.is_signalled() else ending

    def _train_step(self, micro_batches: list[Batch], tokens: int) -> None:
        step, training = self.position.step, self.config.training
        factor = learning_rate_factor(training, step + 1, self.length.planned_steps)
        set_learning_rate(self.strategy.optimizer, factor)
        self.model.begin_step(step)
        record = StepRecord(tokens, factor * training.learning_rate, torch.zeros((), device=self.device).double())
        for number, batch in enumerate(micro_batches, start=1):
            output = self.forward(batch)
            assert output.loss_sum is not None
            loss = sum(output.aux_losses.values(), output.loss_sum) * (self.strategy.gradient_scale / max(1, tokens))
            self.strategy.backward(self.scaler.scale(loss) if self.scaler else loss, number == len(micro_batches))
            record.loss_sum += output.loss_sum.detach()
            for name, value in output.aux_losses.items():
                record.aux_sums[name] = record.aux_sums.get(name, 0) + value.detach()
        if self.scaler:
            self.scaler.unscale(self.model)
        record.gradient_norm = self.strategy.gradient_norm_and_clip(training.gradient_clipping)
        self.position.step, self.position.tokens = step + 1, self.position.tokens + tokens
        self._guard.step(record.gradient_norm)
        self.record = record

    def forward(self, batch: Batch) -> ModelOutput:
        """The model on a batch with its labels, in the run's precision."""
        on_device = (batch.pin_memory() if self.device.type == "cuda" else batch).to(self.device, non_blocking=True)
        training = self.config.training
        with torch.autocast(self.device.type, AMP_DTYPES[training.amp_dtype], enabled=training.use_amp):
            output: ModelOutput = self.strategy.model(
                on_device.input_ids,
                labels=on_device.labels,
                document_ids=on_device.document_ids,
                source_groups=on_device.source_groups,
                harm_labels=on_device.harm_labels,
            )
        return output

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.strategy.context.device

    @property
    def is_last_step(self) -> bool:
        """Whether the steps or the tokens that the config allows are done; time and signals are not foreseen."""
        max_tokens = self.length.max_tokens
        return self.position.step >= self.length.steps or (
            max_tokens is not None and self.position.tokens >= max_tokens
        )

    @property
    def training_clock(self) -> float:
        """Seconds of training since the run began, without the pauses of this start."""
        return time.perf_counter() - self._started - self._paused

    def read_position(self) -> RunPosition:
        """The position with its clock and counts brought up to now; it waits for the device."""
        self._guard.read_counts()
        self.position.seconds = time.perf_counter() - self._started
        return self.position

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the training clock while something else is done, once the device has finished the steps before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def is_signalled(self) -> bool:
        """Whether any rank was told to stop; the same on all, which must all ask."""
        return bool(all_reduce_sum(torch.tensor(self._signals.received is not None).long()))

    def _agree(self, micro_batches: list[Batch]) -> tuple[int, bool, bool]:
        """Tokens of the step over all ranks, and whether a signal or the clock ends the run on any of them."""
        seconds = time.perf_counter() - self._started
        is_late = self.length.max_seconds is not None and seconds >= self.length.max_seconds
        tokens = sum(batch.num_tokens for batch in micro_batches)
        # In host memory: no rank waits for its device to hear of the others.
        votes = all_reduce_sum(torch.tensor([tokens, self._signals.received is not None, is_late])).tolist()
        return votes[0], votes[1] > 0, votes[2] > 0
