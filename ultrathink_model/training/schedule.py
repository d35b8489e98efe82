"""The learning rate as a pure function of the optimizer step: nothing to save, nothing to restore."""

import math

from torch.optim import Optimizer

from ultrathink_model.config.training import TrainingConfig


def learning_rate_factor(training: TrainingConfig, step: int, total_steps: int) -> float:
    """The share of the peak learning rate at which optimizer step `step` is taken.

    It rises linearly and reaches 1 at step `warmup_steps`; then, with p the share of the remaining steps that are
    done, it falls to r = `min_lr_ratio` at p = 1:

    - cosine: r + (1 - r) (1 + cos πp) / 2
    - linear: 1 - (1 - r) p
    - wsd: 1, and linearly to r over the run's last `decay_fraction` (warm-up, stable, decay; Hu et al. 2024,
      https://arxiv.org/abs/2404.06395, whose decay is exponential)
    - constant: 1

    Args:
        training: Section `training` of the config.
        step: Number of the step, from 1. Steps past `total_steps` are taken at the last rate.
        total_steps: Steps of the whole run.
    """
    warmup_steps = training.warmup_steps
    if step <= warmup_steps:
        return step / warmup_steps
    if training.schedule == "constant":
        return 1.0
    floor = training.min_lr_ratio
    falling_steps = max(1, total_steps - warmup_steps)
    if training.schedule == "wsd":
        falling_steps = min(max(1, round(training.decay_fraction * total_steps)), falling_steps)
    progress = min(1.0, max(0.0, 1 - (total_steps - step) / falling_steps))
    if training.schedule == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return 1 - (1 - floor) * progress


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets each group's learning rate to `factor` times the group's own `peak_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
