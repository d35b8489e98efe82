"""The plan of a run: what it needs, whether it fits, how long it takes and what it costs."""

from dataclasses import dataclass

from ultrathink_model.config import Config
from ultrathink_model.errors import ConfigError
from ultrathink_model.planning.compute import forward_flops_per_token, training_flops_per_token
from ultrathink_model.planning.hardware import Device
from ultrathink_model.planning.media import media_flops_per_token
from ultrathink_model.planning.memory import FP32, Memory, checkpoint_bytes, training_memory
from ultrathink_model.planning.parameters import Parameters, count_parameters

GIB = 2**30
# What the driver, the libraries and the allocator's gaps take of a device.
RESERVED_GIB, RESERVED_SHARE = 0.7, 0.05


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        config: The run.
        parameters: The model's, by part.
        forward_flops: Operations of a forward pass, per token.
        training_flops: Operations of training, per token.
        memory: Of one rank at its peak.
        strategy: How the ranks share the work.
        ranks: Number of ranks, one a device.
        checkpoint: Bytes of one checkpoint.
        disk: Bytes of the checkpoints that are kept, one that is being written, and the final model.
        tokens: Training tokens; None where the config does not say.
    """

    config: Config
    parameters: Parameters
    forward_flops: float
    training_flops: float
    memory: Memory
    strategy: str
    ranks: int
    checkpoint: float
    disk: float
    tokens: int | None

    def fits(self, device: Device) -> bool:
        """Whether a rank's peak leaves the device what its driver and allocator take."""
        return self.memory.total / GIB <= device.memory_gib * (1 - RESERVED_SHARE) - RESERVED_GIB

    def tokens_per_second(self, device: Device, utilisation: float) -> float:
        """Training tokens of text a second over all ranks, at a share of the device's peak."""
        return self._flops_per_second(device, utilisation) / self.training_flops

    def image_tokens_per_second(self, device: Device, utilisation: float) -> float:
        """The same of sequences that are full of images, each of which its encoder reads once."""
        work = self.training_flops + media_flops_per_token(self.config)
        return self._flops_per_second(device, utilisation) / work

    def _flops_per_second(self, device: Device, utilisation: float) -> float:
        peak = device.tflops if self.config.training.use_amp else device.tflops_fp32
        return self.ranks * peak * 1e12 * utilisation


def make_plan(config: Config, ranks: int = 1, samples: int | None = None) -> Plan:
    """The plan of a config.

    Args:
        config: The run.
        ranks: Ranks, one a device.
        samples: Training sequences; None takes what the config says.

    Raises:
        ConfigError: The ranks make no whole rows of `distributed.tensor_parallel_size`.
    """
    size = config.distributed.tensor_parallel_size
    if ranks % size:
        raise ConfigError(
            f"distributed.tensor_parallel_size={size} does not divide the {ranks} ranks of the plan; say --ranks {size}, or a "
            "multiple of it"
        )
    parameters = count_parameters(config)
    checkpoint = checkpoint_bytes(config)
    strategy = planned_strategy(config, ranks)
    return Plan(
        config=config,
        parameters=parameters,
        forward_flops=forward_flops_per_token(config),
        training_flops=training_flops_per_token(config),
        memory=training_memory(config, strategy, ranks),
        strategy=strategy,
        ranks=ranks,
        checkpoint=checkpoint,
        disk=(config.training.keep_checkpoints + 1) * checkpoint + parameters.total * FP32,
        tokens=_training_tokens(config, ranks, samples),
    )


def planned_strategy(config: Config, ranks: int) -> str:
    """`distributed.strategy`, with null resolved as for that many ranks."""
    if config.distributed.strategy is not None:
        return config.distributed.strategy
    if config.distributed.launcher == "deepspeed" or config.distributed.deepspeed_config:
        return "deepspeed"
    return "ddp" if ranks > 1 else "single"


def _training_tokens(config: Config, ranks: int, samples: int | None) -> int | None:
    """The least of the bounds that the config sets on the run; None where it has none."""
    training, length = config.training, config.model.max_seq_length
    if samples is not None:
        return samples * length
    rows = ranks // config.distributed.tensor_parallel_size
    batch = training.global_batch_size or training.batch_size * training.gradient_accumulation_steps * rows
    bounds = [
        training.max_tokens,
        None if training.max_steps is None else training.max_steps * batch * length,
        None if config.data.train_samples is None else config.data.train_samples * training.num_epochs * length,
    ]
    return min((bound for bound in bounds if bound is not None), default=None)
