"""Forward passes in the precision of the run."""

from typing import Any

import torch

from ultrathink_model.alignment.sequences import Forward
from ultrathink_model.config import Config
from ultrathink_model.models.transformer import ModelOutput


def in_run_precision(config: Config, forward: Forward, device: torch.device) -> Forward:
    """The forward under `training.use_amp`: policy, reference and reward model must round alike to be compared."""

    def run(*args: Any, **kwargs: Any) -> ModelOutput:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.training.use_amp):
            return forward(*args, **kwargs)

    return run
