"""Starting a model from a trained one, with features switched on that the trained one does not have."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.hf import read_model_config, read_weights
from ultrathink_model.models.hf_config import expert_width
from ultrathink_model.models.transformer import Transformer, is_mixture

# What must be equal for the two models to compute the same function.
MODEL_SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "kv_heads",
    "head_size",
    "feed_forward_size",
    "rope_theta",
    "norm_eps",
    "tie_embeddings",
    "sliding_window",
)
MIXTURE_SHAPE = ("num_experts", "moe_top_k", "expert_width", "layer_frequency")
ROUTED_SHAPE = ("layer_frequency",)


@dataclass
class InitReport:
    """Where the model's weights and buffers come from, by name.

    Attributes:
        taken: From the source, as they were.
        split: Experts and their routers, made from the source's feed-forwards.
        new: Not in the source: as they were in the model.
    """

    taken: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the log."""
        return f"{len(self.taken)} tensors taken as they were, {len(self.split)} made by splitting, {len(self.new)} new"


@torch.no_grad()
def initialise_from(model: Transformer, folder: Path) -> InitReport:
    """Gives a freshly built model the weights of `folder`, so that it computes the same function.

    What the source does not have is left as `build_model` made it, which is neutral for depth routers. Dense
    feed-forwards become experts by `split_into_experts`. The first step's loss is the source's up to rounding, unless
    `moe.upcycle_noise`, `moe.expert_capacity` or a depth budget without warm-up says otherwise.

    Args:
        model: A model from `build_model`.
        folder: The trained model: a `final_model/`, or a Qwen3 or Qwen3-MoE folder.

    Raises:
        CheckpointError: The folder holds no model, or its model cannot become this one.
    """
    folder, target = Path(folder), model.config
    source = read_model_config(folder)
    _refuse_what_differs(source, target, folder)
    generator = torch.Generator().manual_seed(target.training.seed)
    report = InitReport()
    state = model.state_dict()
    for name, weight in read_weights(folder, source):
        experts = _experts_of(name, source, target)
        if experts is None:
            _copy(state[name], weight, name, folder)
            report.taken.append(name)
        elif name.endswith("gate_up.weight"):
            gate_up = split_gate_up(weight, target.moe.num_experts, expert_width(target))
            ...
    report.new = [name for name in state if name not in {*report.taken, *report.split}]
    return report
