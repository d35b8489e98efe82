"""How long a run is: its steps, and where its epochs end."""

from dataclasses import dataclass

from ultrathink_model.config import Config
from ultrathink_model.data import DataManifest, TrainLoader, global_batch_size


@dataclass(frozen=True)
class RunLength:
    """The length of a run as far as the config and the data decide it.

    Attributes:
        steps: Optimizer steps that `max_steps` and `num_epochs` allow.
        planned_steps: Steps that the schedule is laid out over: fewer, where `max_tokens` ends the run before.
        max_tokens: Tokens after which the run ends, or None.
        max_seconds: Seconds of training after which the run ends, or None.
        global_batch: Sequences in one step, over all ranks.
        epoch_sequences: Sequences in one epoch.
    """

    steps: int
    planned_steps: int
    max_tokens: int | None
    max_seconds: float | None
    global_batch: int
    epoch_sequences: int

    def epochs_done(self, step: int) -> int:
        """Whole epochs within the first `step` steps."""
        return step * self.global_batch // self.epoch_sequences

    def ends_epoch(self, step: int, every: int = 1) -> bool:
        """Whether step `step` (from 1) holds the end of an epoch whose number is a multiple of `every`."""
        return self.epochs_done(step) // every > self.epochs_done(step - 1) // every


def run_length(config: Config, manifest: DataManifest, loader: TrainLoader, world_size: int) -> RunLength:
    """The length of a run; whichever bound is met first ends it."""
    training = config.training
    global_batch = global_batch_size(config, world_size)
    steps = -(-training.num_epochs * loader.epoch_sequences // global_batch)
    if training.max_steps is not None:
        steps = min(steps, training.max_steps)
    planned = steps
    if training.max_tokens is not None:
        train = manifest.splits["train"]
        tokens_per_step = global_batch * train.tokens / train.sequences
        planned = min(steps, max(1, round(training.max_tokens / tokens_per_step)))
    return RunLength(steps, planned, training.max_tokens, training.max_seconds, global_batch, loader.epoch_sequences)
