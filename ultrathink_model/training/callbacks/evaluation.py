"""Validation while training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ultrathink_model.config import Config
from ultrathink_model.data import Batch, DataManifest, ValidationLoader
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.evaluation.measures import training_metrics
from ultrathink_model.evaluation.perplexity import validation_loss
from ultrathink_model.training.callbacks.callback import Callback

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer


class EvaluationCallback(Callback):
    """Measures `val/loss` every `evaluation.eval_steps` steps, every `eval_frequency` epochs and at the end.

    On the way it takes `evaluation.eval_samples` sequences; at the end, all of them. A run that starts from a trained
    model is measured before its first step too, in full: it should begin where that model ended. The measures that
    `evaluation.training_measures` names are taken beside it, as `eval/*`; every rank takes them on the same text, since a
    sharded model needs all of them.
    """

    def __init__(
        self,
        config: Config,
        manifest: DataManifest,
        context: RankContext,
        metrics: dict[str, float],
        *,
        at_start: bool,
    ) -> None:
        """Prepares the callback.

        Args:
            config: Section `evaluation` says how often and on how much.
            manifest: Prepared data.
            context: This rank.
            metrics: Takes the results.
            at_start: Whether to measure before the first step.
        """
        self._config, self._manifest, self._context = config, manifest, context
        self._metrics = metrics
        self._at_start = at_start
        self._tokenizer = Tokenizer.load(manifest.tokenizer_folder) if config.evaluation.training_measures else None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Measures the model that the run starts from, or what a signal kept the start before from measuring."""
        if self._at_start:
            self._evaluate(trainer, None)
        elif trainer.position.step and "val/loss" not in trainer.measured:
            self.on_step_end(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        """Measures where it is due."""
        evaluation, step = self._config.evaluation, trainer.position.step
        is_due = trainer.length.ends_epoch(step, evaluation.eval_frequency) or (
            evaluation.eval_steps is not None and step % evaluation.eval_steps == 0
        )
        if is_due and not trainer.is_last_step:
            self._evaluate(trainer, evaluation.eval_samples)

    def on_finish(self, trainer: Trainer) -> None:
        """Measures on the whole validation split."""
        self._evaluate(trainer, None)

    def _evaluate(self, trainer: Trainer, max_sequences: int | None) -> None:
        context = self._context
        loader = ValidationLoader(
            self._manifest,
            self._config,
            rank=context.data_rank,
            world_size=context.data_ranks,
            max_sequences=max_sequences,
        )
        with trainer.pause(), trainer.averaged_weights():
            trainer.strategy.model.eval()
            result = validation_loss(
                trainer.forward, _until_signal(loader, trainer), context.device, context.sum_over_data
            )
            trainer.strategy.model.train()
        if trainer.is_signalled():
            return
        self._metrics["val/loss"] = result.loss
        if self._tokenizer is not None:
            # A pause of its own: the watch over the ranks has not been told of these forward passes.
            with trainer.pause(), trainer.averaged_weights():
                trainer.model.eval()
                self._metrics |= training_metrics(
                    trainer.model, self._tokenizer, self._manifest, self._config, max_sequences
                )
                trainer.model.train()


def _until_signal(loader: ValidationLoader, trainer: Trainer) -> Iterator[Batch]:
    """The loader's batches, up to the one before which a rank was told to stop; there is one at least."""
    for number, batch in enumerate(loader):
        if number and trainer.is_signalled():
            return
        yield batch
