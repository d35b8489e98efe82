"""Expert parallelism: the experts of each mixture are cut over the ranks of the mesh axis `ep`."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ultrathink_model.distributed.context import RankContext
from ultrathink_model.errors import ConfigError
from ultrathink_model.models.dispatch import Dispatch, sum_copies, take_copies
from ultrathink_model.models.moe import MixExperts, MixtureOfExperts, apply_experts

EXPERT_WEIGHTS = ("gate_up", "down")


class ExpertParallel:
    """Each rank holds some experts of every mixture, and computes them for the tokens of all ranks of its row.

    The ranks are a grid (dp_replicate, ep): a row of `ep` ranks holds every expert once. Copies of tokens travel to
    the rank of their expert and back (GShard, Lepikhin et al. 2020, arXiv 2006.16668); so do their gradients, which
    leaves each rank the gradient of its experts over its row. Everything else is trained as without it.

    Sizes of what is sent differ from step to step, and are read on the host: one wait for the device a mixture.
    """

    def __init__(self, size: int, context: RankContext) -> None:
        """Builds the grid; every rank calls it.

        Raises:
            ConfigError: The ranks do not make whole rows of `size`.
        """
        if context.world_size % size:
            raise ConfigError(
                f"distributed.expert_parallel_size={size} does not divide the {context.world_size} ranks of the run; "
                "take a divisor, or start another number of ranks"
            )
        shape = (context.world_size // size, size)
        self._grid = init_device_mesh(context.device.type, shape, mesh_dim_names=("dp_replicate", "ep"))
        self.parameters: dict[str, nn.Parameter] = {}

    def cut(self, model: nn.Module) -> None:
        """Leaves this rank its experts: their weights become `DTensor`s, cut over `ep`."""
        axis = self._grid["ep"]
        for name, module in model.named_modules():
            if not isinstance(module, MixtureOfExperts):
                continue
            for key in EXPERT_WEIGHTS:
                # All ranks hold the same whole weight, so nothing needs to be sent.
                part = distribute_tensor(getattr(module, key).detach(), axis, [Shard(0)], src_data_rank=None)
                setattr(module, key, nn.Parameter(part))
                self.parameters[f"{name}.{key}"] = getattr(module, key)
            module.apply_experts, module.native = _ExpertsOfAllRanks(axis, module.native), None

    def sum_gradients(self) -> None:
        """Adds the experts' gradients of a whole step over the rows."""
        rows = self._grid.get_group("dp_replicate")
        if dist.get_world_size(rows) == 1:
            return
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                dist.all_reduce(_part(parameter.grad), group=rows)


class _ExpertsOfAllRanks:
    """Does what `apply_experts` does, with experts that lie on the ranks of an axis."""

    def __init__(self, axis: DeviceMesh, native: MixExperts | None) -> None:
        self._group, self._ranks, self._native = axis.get_group(), axis.size(), native

    # The sizes that are read on the host would break a compiled graph anyway.
    @torch.compiler.disable
    def __call__(
        self,
        copies: Float[Tensor, "copies hidden"],
        scale: Float[Tensor, "copies 1"],
        ends: Int[Tensor, " experts"],
        gate_up: Tensor,
        down: Tensor,
    ) -> Float[Tensor, "copies hidden"]:
        gate_up, down = _part(gate_up), _part(down)
        sent = ends.diff(prepend=ends.new_zeros(1)).view(self._ranks, -1)  # (ranks, experts of each)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self._group)
        there, here = torch.stack((sent.sum(dim=1), received.sum(dim=1))).tolist()
        arrived = _exchange(torch.cat((copies, scale), dim=1)[: sum(there)], here, there, self._group)
        # They come sorted by rank, then by expert; the products want them by expert alone.
        experts = torch.arange(sent.shape[1], device=ends.device).repeat(self._ranks)
        by_expert = Dispatch.sort(experts.repeat_interleave(received.flatten()).unsqueeze(1), sent.shape[1])
        results = self._results(arrived, by_expert, gate_up, down)
        returned = _exchange(results, there, here, self._group)
        # Copies of no expert stay here; the mixture takes nothing of what stands in their place.
        return torch.cat((returned, returned.new_zeros(copies.shape[0] - returned.shape[0], returned.shape[1])))

    def _results(self, arrived: Tensor, by_expert: Dispatch, gate_up: Tensor, down: Tensor) -> Tensor:
        """What this rank's experts make of copies that have arrived, each with its scale behind it."""
        sizes = (arrived.shape[1] - 1, 1)
        if self._native is not None:
            rows, scales = arrived.split(sizes, dim=1)
            mixed = self._native(rows, scales, by_expert, gate_up, down)
            if mixed is not None:
                return mixed
        rows, scales = take_copies(arrived, by_expert).split(sizes, dim=1)
        return sum_copies(apply_experts(rows, scales, by_expert.ends, gate_up, down), by_expert)


def _exchange(rows: Tensor, take: list[int], give: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends the first `give[0]` rows to the group's first rank and so on; returns `take[i]` rows of each rank i."""
    result: Tensor = _Exchange.apply(rows, take, give, group)
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, take: list[int], give: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.take, ctx.give, ctx.group = take, give, group
        return _all_to_all(rows, take, give, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.give, ctx.take, ctx.group), None, None, None


def _all_to_all(rows: Tensor, take: list[int], give: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(take), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), take, give, group=group)
    return out


def _part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
