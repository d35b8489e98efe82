"""The figures of a step's routing: numbers that make curves, and tables for the report."""

import math
from typing import Any

import torch
from torch import Tensor

from ultrathink_model.config.model import MoEConfig
from ultrathink_model.media.batch import MODALITIES

PATHS = ("fast", "standard", "deep", "ultra_deep")


def routing_metrics(statistics: dict[str, Tensor]) -> dict[str, float]:
    """The numbers that are logged at a step.

    `train/moe/max_load` and `min_load` are the fullest and the emptiest expert's load in units of its fair share; `train/moe/group_share/<group>` the
    share of that group's sources that its own experts took. `train/moe/<modality>/max_load` is the fullest expert's load by
    the tokens of text, images (`image`) or sound (`audio`) alone, and `…/entropy` that of the experts' shares of them, 1
    where all take the same.

    Args:
        statistics: What the model's `routing_statistics` returned.
    """
    metrics = {f"train/{name}": float(value) for name, value in statistics.items() if value.numel() == 1}
    if "moe/load" in statistics:
        load = statistics["moe/load"]  # (mixture layers, experts)
        metrics["train/moe/max_load"] = float(load.max()) * load.shape[-1]
        metrics["train/moe/min_load"] = float(load.min()) * load.shape[-1]
        groups = zip(MoEConfig().group_sizes, statistics["moe/group_share"].diagonal().tolist(), strict=True)
        metrics |= {f"train/moe/group_share/{group}": share for group, share in groups if not math.isnan(share)}
    if "moe/modality_load" in statistics:
        metrics |= _modality_metrics(statistics["moe/modality_load"])
    if "dre/paths" in statistics:
        shares = statistics["dre/paths"].mean(dim=0).tolist()  # (paths,)
        metrics |= {f"train/dre/path/{path}": share for path, share in zip(PATHS, shares, strict=True)}
    return metrics


def _modality_metrics(load: Tensor) -> dict[str, float]:
    """Of each modality that the step had: the fullest expert's load, and how evenly the experts share its tokens."""
    metrics = {}
    for name, own in zip(MODALITIES, load, strict=True):  # (mixture layers, experts)
        if own.isfinite().all():
            metrics[f"train/moe/{name}/max_load"] = float(own.max()) * own.shape[-1]
            metrics[f"train/moe/{name}/entropy"] = float(_evenness(own.mean(dim=0)))
    return metrics


def _evenness(shares: Tensor) -> Tensor:
    """Entropy of shares, 1 where they are all the same."""
    return -torch.special.xlogy(shares, shares).sum() / math.log(max(2, len(shares)))


def routing_tables(statistics: dict[str, Tensor]) -> dict[str, Any]:
    """The whole statistics as JSON can hold them; what is not a number is null."""
    return {name: _plain(value.tolist()) for name, value in statistics.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if math.isfinite(value) else None
