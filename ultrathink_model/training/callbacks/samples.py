"""Sample texts while training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ultrathink_model.config import Config
from ultrathink_model.data import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.evaluation.samples import generate_samples
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically
from ultrathink_model.training.callbacks.callback import Callback

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer


class SamplesCallback(Callback):
    """Writes what the model makes of the same held-out prompts every so many steps, to `samples.jsonl`.

    Every rank generates, since a sharded model needs all of them, from a generator of its own that leaves the run's
    draws alone; the first one writes.
    """

    def __init__(
        self, steps: int, config: Config, manifest: DataManifest, context: RankContext, folder: RunFolder
    ) -> None:
        self._steps, self._config, self._manifest, self._context = steps, config, manifest, context
        self._file = folder.path / "samples.jsonl"
        self._tokenizer = Tokenizer.load(manifest.tokenizer_folder)

    def on_train_begin(self, trainer: Trainer) -> None:
        """Drops the samples of steps that are made anew."""
        self.on_rollback(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        """Samples where it is due."""
        step = trainer.position.step
        if step % self._steps:
            return
        with trainer.pause(), trainer.averaged_weights():
            samples = generate_samples(
                trainer.model, self._tokenizer, self._manifest, self._config.evaluation, self._config.training.seed
            )
        if self._context.is_main:
            lines = [json.dumps({"step": step, **sample.model_dump()}, ensure_ascii=False) for sample in samples]
            with self._file.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def on_rollback(self, trainer: Trainer) -> None:
        """Drops the samples of steps that are made anew."""
        if not self._context.is_main or not self._file.exists():
            return
        kept = [
            line
            for line in self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n") and json.loads(line)["step"] <= trainer.position.step
        ]
        write_atomically(self._file, "".join(kept))
