"""The strategies by name."""

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext, strategy_name
from ultrathink_model.distributed.ddp import DDPStrategy
from ultrathink_model.distributed.deepspeed import DeepSpeedStrategy
from ultrathink_model.distributed.fsdp import FSDPStrategy
from ultrathink_model.distributed.interface import Strategy
from ultrathink_model.distributed.single import SingleStrategy

__all__ = ["STRATEGIES", "Strategy", "make_strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (SingleStrategy, DDPStrategy, FSDPStrategy, DeepSpeedStrategy)
}


def make_strategy(config: Config, context: RankContext) -> Strategy:
    """The strategy that a config asks for; `prepare` is the next thing to call on it.

    Raises:
        ConfigError: The strategy does not go with another key of the config.
        DependencyError: The strategy's package is not installed.
    """
    return STRATEGIES[strategy_name(config)](config, context)
