"""Starting a model from a trained one, with features switched on that it did not have."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ultrathink_model.config import Config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.hf import read_model_config, read_weights
from ultrathink_model.models.transformer import Transformer


@dataclass
class InitReport:
    """Where each weight of a model came from.

    Attributes:
        taken: Copied as they were.
        split: Made from the source's feed-forwards.
        new: As `build_model` drew them.
    """

    taken: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for a log."""
        return f"{len(self.taken)} weights taken, {len(self.split)} split into experts, {len(self.new)} new"


@torch.no_grad()
def initialise_from(model: Transformer, folder: Path) -> InitReport:
    """Gives the model the weights of `folder`, so that it computes the same function.

    Raises:
        CheckpointError: The folder is not a model, or its model cannot become this one.
    """
    source = read_model_config(folder)
    _refuse_other_shapes(source, model.config, folder)
    report = InitReport()
    state = model.state_dict()
    for name, weight in read_weights(folder, source):
        state[name].copy_(weight)
        report.taken.append(name)
    report.new = [name for name in state if name not in set(report.taken)]
    return report


def _refuse_other_shapes(source: Config, target: Config, folder: Path) -> None:
    names = (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "kv_heads",
        "head_size",
        "feed_forward_size",
        "tie_embeddings",
    )
    differences = [
        f"{name} {getattr(source.model, name)} there, {getattr(target.model, name)} here"
        for name in names
        if getattr(source.model, name) != getattr(target.model, name)
    ]
    if differences:
        raise CheckpointError(f"--init-from {folder}: {'; '.join(differences)}. Take the source's values for them.")
