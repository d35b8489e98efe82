"""The training loop."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.data import Batch
from ultrathink_model.distributed.context import all_reduce_sum
from ultrathink_model.distributed.interface import Strategy
from ultrathink_model.media.placeholders import KINDS, Kind
from ultrathink_model.models.transformer import ModelOutput, Transformer
from ultrathink_model.training.averaging import WeightAverage
from ultrathink_model.training.callbacks.callback import Callback
from ultrathink_model.training.checkpoint import RunPosition
from ultrathink_model.training.curriculum import cut_rows, sequence_length
from ultrathink_model.training.guard import StepGuard, TrainingDivergedError
from ultrathink_model.training.length import RunLength
from ultrathink_model.training.loss_scaler import LossScaler
from ultrathink_model.training.schedule import learning_rate_factor, set_learning_rate
from ultrathink_model.training.signals import StopSignals
from ultrathink_model.training.spikes import SpikeDetector
from ultrathink_model.training.throughput import Throughput
from ultrathink_model.training.watch import OPTIMIZER, RankWatch

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Ending = Literal["finished", "stopped"]

# The steps of one rank, from a step of the data on.
BatchesFrom = Callable[[int], Iterator[list[Batch]]]


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


@dataclass(frozen=True)
class WholeStep:
    """What the ranks know of each other before a step.

    Attributes:
        tokens: Tokens of the step over all ranks.
        is_signalled: Whether any of them was told to stop.
        is_late: Whether the clock ends the run on any of them.
        media: Kinds of media that any of them has in its batches.
    """

    tokens: int
    is_signalled: bool
    is_late: bool
    media: list[Kind]


class Trainer:
    """Trains a prepared model until a bound of the config is met or a signal comes.

    Attributes:
        position: How far the run is; checkpoints hold it.
        record: What the last step measured; None before the first.
        measured: The figures that were logged at this step, by this start or the one before; empty at most steps.
        callbacks: Called after each step, in this order.
        average: The mean of the weights, where `training.ema_decay` asks for it.
        throughput: What the device could do at its best; None where nobody asked.
    """

    def __init__(
        self,
        config: Config,
        strategy: Strategy,
        batches: BatchesFrom,
        length: RunLength,
        position: RunPosition,
        signals: StopSignals,
        callbacks: Sequence[Callback],
        go_back: "Callable[[Trainer], RunPosition | None]",
        watch: RankWatch,
    ) -> None:
        """Prepares the trainer.

        Args:
            config: The run.
            strategy: Prepared, at the position.
            batches: Where the steps come from.
            length: Bounds of the run.
            position: How far the run is.
            signals: What may stop it.
            callbacks: Called in this order.
            go_back: Restores the last good checkpoint and returns its position; None where there is none.
            watch: Told of each part of a step.
        """
        assert isinstance(strategy.unwrapped, Transformer)
        self.config, self.strategy, self.length, self.position = config, strategy, length, position
        self.model: Transformer = strategy.unwrapped
        self.callbacks = callbacks
        self.record: StepRecord | None = None
        needs_scale = config.training.use_amp and config.training.amp_dtype == "fp16"
        self.scaler = LossScaler(next(self.model.parameters()).device) if needs_scale else None
        training = config.training
        self.average = WeightAverage(strategy, training.ema_decay) if training.ema_decay is not None else None
        self.spikes = SpikeDetector(training.spike_deviations, self.device) if training.spike_deviations else None
        self.throughput: Throughput | None = None
        self.measured: dict[str, float] = {}
        self._batches_from, self._signals = batches, signals
        self._go_back, self._watch = go_back, watch
        self._paused = 0.0

    def fit(self) -> Ending:
        """Trains; `stopped` when a signal ended it before its bounds."""
        try:
            self._begin()
            ending = self._steps()
            for callback in self.callbacks:
                callback.on_finish(self) if ending == "finished" else callback.on_stop(self)
        finally:
            self._watch.close()
            for callback in self.callbacks:
                callback.on_end()
        return "stopped" if self.is_signalled() else ending

    def _begin(self) -> None:
        self._started = time.perf_counter() - self.position.seconds
        self._set_out()
        self.strategy.model.train()
        for callback in self.callbacks:
            callback.on_train_begin(self)

    def _set_out(self) -> None:
        """Takes the loop's own parts to the position."""
        self._batches = self._batches_from(self.position.data_step)
        limit = self.config.training.max_bad_steps
        self._guard = StepGuard(self.strategy, self.scaler, limit, self.position, self.spikes)

    def _steps(self) -> Ending:
        while not self.is_last_step:
            self._watch.note("to read the data")
            micro_batches = next(self._batches)
            whole = self._agree(micro_batches)
            if whole.is_signalled or whole.is_late:
                self._watch.rest()
                return "stopped" if whole.is_signalled else "finished"
            try:
                self._train_step(micro_batches, whole)
                self._watch.rest()
                for callback in self.callbacks:
                    callback.on_step_end(self)
                if self.is_last_step:
                    self.read_position()
            except TrainingDivergedError as error:
                self._roll_back(error)
        return "finished"

    def _roll_back(self, error: TrainingDivergedError) -> None:
        """Goes back to the last good checkpoint, and on with the batches after those that led here from it.

        The good ones among them are passed over too: with them the run would come here again just as it was.
        """
        self._watch.rest()
        came_from = self.position
        if came_from.rollbacks >= self.config.training.max_rollbacks:
            raise error
        for callback in self.callbacks:
            callback.before_rollback(self)
        position = self._go_back(self)
        if position is None:
            raise error
        passed_over = came_from.data_step - position.data_step
        position.rollbacks = came_from.rollbacks + 1
        position.batches_passed_over = came_from.data_step - position.step
        # Bad steps stay counted, those of a lost stretch too.
        position.bad_steps, position.bad_steps_in_row = came_from.bad_steps, 0
        self.position = position
        self._set_out()
        for callback in self.callbacks:
            callback.on_rollback(self)
        logger.warning(
            "%s. Back to step %d, and on with the batches after the %d steps since then (rollback %d of %d)",
            error,
            position.step,
            passed_over,
            position.rollbacks,
            self.config.training.max_rollbacks,
        )

    def _train_step(self, micro_batches: list[Batch], whole: WholeStep) -> None:
        step, training, tokens = self.position.step, self.config.training, whole.tokens
        self.measured = {}
        factor = learning_rate_factor(training, step + 1, self.length.planned_steps)
        set_learning_rate(self.strategy.optimizer, factor)
        self.model.begin_step(step)
        length = sequence_length(self.config, step)
        record = StepRecord(tokens, factor * training.learning_rate, torch.zeros((), device=self.device).double())
        for number, batch in enumerate(micro_batches, start=1):
            output = self.forward(cut_rows(batch, length))
            assert output.loss_sum is not None
            self._watch.note("a backward pass")
            loss = sum(output.aux_losses.values(), output.loss_sum) * (self.strategy.gradient_scale / max(1, tokens))
            self.strategy.backward(self.scaler.scale(loss) if self.scaler else loss, number == len(micro_batches))
            record.loss_sum += output.loss_sum.detach()
            for name, value in output.aux_losses.items():
                record.aux_sums[name] = record.aux_sums.get(name, 0) + value.detach()
        self._watch.note(OPTIMIZER)
        self.model.complete_gradients(whole.media)
        if self.scaler:
            self.scaler.unscale(self.model)
        record.gradient_norm = self.strategy.gradient_norm_and_clip(training.gradient_clipping)
        self.position.step, self.position.tokens = step + 1, self.position.tokens + tokens
        self.record = record
        loss = record.loss_sum if self.spikes is None else self.strategy.context.sum_over_data(record.loss_sum.clone())
        bad = self._guard.step(record.gradient_norm, loss / max(1, tokens))
        if self.average is not None:
            self.average.update(step + 1, bad)

    def forward(self, batch: Batch) -> ModelOutput:
        """The model on a batch with its labels, in the run's precision."""
        self._watch.note("a forward pass")
        on_device = (batch.pin_memory() if self.device.type == "cuda" else batch).to(self.device, non_blocking=True)
        training = self.config.training
        dtype, keeps = AMP_DTYPES[training.amp_dtype], self.strategy.keeps_casts
        with torch.autocast(self.device.type, dtype, enabled=training.use_amp, cache_enabled=keeps):
            output: ModelOutput = self.strategy.model(
                on_device.input_ids,
                labels=on_device.labels,
                document_ids=on_device.document_ids,
                source_groups=on_device.source_groups,
                harm_labels=on_device.harm_labels,
                media=on_device.media,
            )
        return output

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Has the model hold the average of its weights while it is open, where the config asks for one."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

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
        self._watch.rest()
        self._paused += time.perf_counter() - began

    def is_signalled(self) -> bool:
        """Whether any rank was told to stop; the same on all, which must all ask."""
        return bool(all_reduce_sum(torch.tensor(self._signals.received is not None).long()))

    def _agree(self, micro_batches: list[Batch]) -> WholeStep:
        """What the ranks must know of each other before a step."""
        seconds = time.perf_counter() - self._started
        is_late = self.length.max_seconds is not None and seconds >= self.length.max_seconds
        context = self.strategy.context
        tokens = sum(batch.num_tokens for batch in micro_batches) if context.rank == context.first_of_row else 0
        media = {kind for batch in micro_batches if batch.media is not None for kind in batch.media.kinds()}
        own = [tokens, self._signals.received is not None, is_late, *(kind in media for kind in KINDS)]
        self._watch.note("to count tokens with the other ranks")
        # In host memory: no rank waits for its device to hear of the others.
        tokens, signals, late, *seen = all_reduce_sum(torch.tensor(own)).tolist()
        kinds = [kind for kind, batches in zip(KINDS, seen, strict=True) if batches]
        return WholeStep(tokens, signals > 0, late > 0, kinds)
