"""The strategies by name."""

import torch.distributed as dist

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext, strategy_name
from ultrathink_model.distributed.ddp import DDPStrategy
from ultrathink_model.distributed.deepspeed import DeepSpeedStrategy
from ultrathink_model.distributed.fsdp import FSDPStrategy
from ultrathink_model.distributed.interface import Strategy
from ultrathink_model.distributed.single import SingleStrategy
from ultrathink_model.errors import ConfigError, DistributedError

__all__ = ["STRATEGIES", "Strategy", "make_strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (SingleStrategy, DDPStrategy, FSDPStrategy, DeepSpeedStrategy)
}

OFFLOADING = ("fsdp", "deepspeed")


def make_strategy(config: Config, context: RankContext) -> Strategy:
    """The strategy that a config asks for; `prepare` is the next thing to call on it.

    Raises:
        ConfigError: The strategy does not go with another key of the config.
        DependencyError: The strategy's package is not installed.
        DistributedError: The strategy needs ranks, and this process was not started as one.
    """
    name = strategy_name(config)
    if config.distributed.cpu_offload and name not in OFFLOADING:
        raise ConfigError(
            f"distributed.cpu_offload=true has no effect under distributed.strategy={name}; "
            f"take {' or '.join(OFFLOADING)}, or remove it"
        )
    if name != "single" and not dist.is_initialized():
        raise DistributedError(
            f"distributed.strategy={name} works among ranks, and this process is none; start it through "
            "distributed.launch.launch, torchrun or deepspeed"
        )
    return STRATEGIES[name](config, context)
