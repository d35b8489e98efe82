"""Our trainer, as it runs, on random tokens."""

import functools
from collections.abc import Callable, Iterator

from torch import Tensor

from peers.sizes import draw_rows
from peers.turns import LoopSteps
from ultrathink_model.config import Config
from ultrathink_model.data import Batch
from ultrathink_model.distributed.context import init_distributed
from ultrathink_model.distributed.strategy import make_strategy
from ultrathink_model.models.transformer import build_model
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.assembly import compile_model
from ultrathink_model.training.callbacks.callback import Callback
from ultrathink_model.training.checkpoint import RunPosition
from ultrathink_model.training.length import RunLength
from ultrathink_model.training.optimizer import make_optimizer
from ultrathink_model.training.signals import StopSignals
from ultrathink_model.training.trainer import Trainer
from ultrathink_model.training.watch import RankWatch

ENDLESS = 1_000_000


class _PassOn(Callback):
    def __init__(self, pass_on: Callable[[], None]) -> None:
        self._pass_on = pass_on

    def on_step_end(self, trainer: Trainer) -> None:
        self._pass_on()


def our_trainer(config: Config) -> LoopSteps:
    """Steps of our training loop on one fixed batch of `training.batch_size` rows."""
    batch = draw_rows(config.training.batch_size, config.model.max_seq_length, config.model.vocab_size)
    return LoopSteps(lambda pass_on: _make_trainer(config, batch, pass_on).fit())


def _make_trainer(config: Config, rows: Tensor, pass_on: Callable[[], None]) -> Trainer:
    context = init_distributed(config)
    model = build_model(config)
    compile_model(model, config, context)
    strategy = make_strategy(config, context)
    strategy.prepare(model, functools.partial(make_optimizer, config.training))
    length = RunLength(ENDLESS, ENDLESS, None, None, config.training.batch_size, ENDLESS)
    watch = RankWatch(config, context, RunFolder(config.output.output_dir))
    callbacks = [_PassOn(pass_on)]
    return Trainer(
        config,
        strategy,
        lambda step: _endless(rows),
        length,
        RunPosition(),
        StopSignals(),
        callbacks,
        lambda trainer: None,
        watch,
    )


def _endless(rows: Tensor) -> Iterator[list[Batch]]:
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    while True:
        yield [Batch(tokens, labels, None, None, labels.numel())]
