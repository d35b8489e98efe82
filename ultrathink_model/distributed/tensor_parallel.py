"""Tensor parallelism: the matrices of attention and feed-forward are cut over the ranks of the mesh axis `tp`."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ultrathink_model.distributed.context import RankContext
from ultrathink_model.models.attention import Attention, FeedForward


class TensorParallel:
    """Each rank holds some heads of every attention and some units of every feed-forward, for the tokens of its row.

    The ranks are a grid (dp, tp): those of a row of `tp` see the same data, and hold the cut matrices once together.
    The first matrix of a pair is cut by its outputs, the second by its inputs, so that one sum over the row ends each
    pair, forward and backward (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053). Each rank has whole groups of
    queries with their key and value head. Embedding, norms, experts and loss are whole on every rank, and compute there
    alike.

    A packed weight lies with the rows of each rank together: q₀ k₀ v₀ q₁ k₁ v₁, gate₀ up₀ gate₁ up₁. What is saved has
    the order of the whole model, so that it fits one process.
    """

    def __init__(self, context: RankContext) -> None:
        """Builds the grid; every rank calls it."""
        self._context, size = context, context.tensor_parallel_size
        shape = (context.data_ranks, size)
        self.grid = init_device_mesh(context.device.type, shape, mesh_dim_names=("dp", "tp"))
        # DTensor sums a norm over both axes in one exchange where it knows of this mesh.
        self._ranks = self.grid._flatten("ranks")
        self.parameters: dict[str, nn.Parameter] = {}
        # Norms within a head: whole on every rank, each of which has the gradient of its own heads.
        self._head_norms: list[nn.RMSNorm] = []
        self._orders: dict[str, Tensor] = {}

    def cut(self, model: nn.Module) -> None:
        """Leaves this rank its heads and units: their weights become `DTensor`s, cut over `tp`."""
        self._model = model
        size = self._context.tensor_parallel_size
        for name, module in list(model.named_modules()):
            if isinstance(module, Attention):
                key_rows = module.num_kv_heads * module.head_dim
                parts = (module.num_heads * module.head_dim, key_rows, key_rows)
                self._cut_pair(module, name, "qkv", "output", parts)
                module.num_heads, module.num_kv_heads = module.num_heads // size, module.num_kv_heads // size
                self._head_norms += [module.query_norm, module.key_norm]
            elif isinstance(module, FeedForward):
                half = module.gate_up.out_features // 2
                self._cut_pair(module, name, "gate_up", "down", (half, half))

    def sum_gradients(self) -> None:
        """Adds the gradients of the norms within heads over the row, after a whole step."""
        for norm in self._head_norms:
            if norm.weight.grad is not None:
                dist.all_reduce(_part(norm.weight.grad), group=self.grid.get_group("tp"))

    def sum_over_data(self) -> None:
        """Adds the gradients of the cut weights over the rows, after a whole step."""
        if self._context.data_ranks == 1:
            return
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                dist.all_reduce(_part(parameter.grad), group=self.grid.get_group("dp"))

    def to_saved(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that lies as the weight `name` does; a packed one in the whole model's order, cut over all ranks."""
        if name not in self._orders or not isinstance(tensor, DTensor):
            return tensor
        row = tensor.redistribute(placements=[*[Replicate()] * (tensor.device_mesh.ndim - 1), tensor.placements[-1]])
        whole = row.full_tensor()[self._orders[name].argsort()]
        return distribute_tensor(whole, self._ranks, [Shard(0)], src_data_rank=None)

    def to_live(self, name: str, tensor: Tensor) -> Tensor:
        """The reverse of `to_saved`."""
        if name not in self._orders or not isinstance(tensor, DTensor):
            return tensor
        own = self._model.state_dict()[name]
        whole = tensor.full_tensor()[self._orders[name]]
        return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)

    def _cut_pair(self, module: nn.Module, name: str, first: str, second: str, parts: Sequence[int]) -> None:
        """Cuts two matrices, of which the first packs several with so many rows each."""
        pair = {key: getattr(module, key) for key in (first, second)}
        starts = torch.arange(sum(parts), device=self._context.device).split(list(parts))
        by_rank = zip(*(rows.chunk(self._context.tensor_parallel_size) for rows in starts), strict=True)
        order = torch.cat([rows for own in by_rank for rows in own])
        pair[first].weight = nn.Parameter(pair[first].weight.detach()[order])
        self._orders[f"{name}.{first}.weight"] = order
        # All ranks hold the same whole weight, so nothing needs to be sent.
        plan = {first: ColwiseParallel(), second: RowwiseParallel()}
        parallelize_module(module, self.grid["tp"], plan, src_data_rank=None)
        self.parameters |= {f"{name}.{key}.weight": linear.weight for key, linear in pair.items()}


def _part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
