"""This process among the ranks, and the few exchanges that the rest of the package needs."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.distributed.host_memory import keep_freed_memory
from ultrathink_model.errors import ConfigError, DistributedError


@dataclass(frozen=True)
class RankContext:
    """Which rank this process is, of how many, and the device that it computes on.

    Attributes:
        tensor_parallel_size: Ranks in a row, which see the same data.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    tensor_parallel_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes, logs and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank takes."""
        return self.rank // self.tensor_parallel_size

    @property
    def data_ranks(self) -> int:
        """Shares of the data: the ranks, or the rows of them that share one."""
        return self.world_size // self.tensor_parallel_size

    @property
    def first_of_row(self) -> int:
        """The first rank with this one's data."""
        return self.data_rank * self.tensor_parallel_size

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Adds a tensor up over the shares of the data, in place, and returns it, alike on all ranks."""
        if self.rank != self.first_of_row:
            tensor.zero_()
        return all_reduce_sum(tensor)


def strategy_name(config: Config) -> str:
    """`distributed.strategy`, with null resolved."""
    distributed = config.distributed
    if not distributed.enabled:
        return "single"
    if distributed.strategy is not None:
        return distributed.strategy
    return "deepspeed" if distributed.launcher == "deepspeed" or distributed.deepspeed_config else "ddp"


def init_distributed(config: Config) -> RankContext:
    """Joins the other ranks when the environment says that there are any (torchrun, deepspeed, `launch`).

    Gloo serves tensors in host memory, NCCL those on a GPU. Each rank takes an equal share of the machine's cores
    unless `OMP_NUM_THREADS` is set, and keeps the memory that it frees. A second call returns what the first did.

    Raises:
        ConfigError: Several ranks were started for a config that is not distributed: each would train alone. Or they
            make no whole rows of `distributed.tensor_parallel_size`.
        DistributedError: The machine has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
    if "RANK" not in os.environ:
        return RankContext(0, 0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))
    if world_size > 1 and strategy_name(config) == "single":
        raise ConfigError(
            f"{world_size} ranks were started, and distributed.enabled={config.distributed.enabled}, "
            f"distributed.strategy={config.distributed.strategy} would have each train alone; "
            "add --override distributed.enabled=true, or start one process"
        )
    size = config.distributed.tensor_parallel_size
    if world_size % size:
        raise ConfigError(
            f"distributed.tensor_parallel_size={size} does not divide the {world_size} ranks of the run; take a divisor, "
            "or start another number of ranks"
        )
    device = _device_of(local_rank)
    if not dist.is_initialized():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.distributed.timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    return RankContext(rank, local_rank, world_size, device, size)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Adds a tensor up over all ranks, in place, and returns it; the identity in one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        # A sum in host memory, which gloo carries on every machine, so that no rank waits for its GPU.
        dist.all_reduce(torch.zeros(1))


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank; it must be picklable."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def _device_of(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise DistributedError(
            f"rank {local_rank} of this machine has no GPU: there are {count}; "
            f"start {count} ranks here (distributed.num_processes={count}), or hide the GPUs to train on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
