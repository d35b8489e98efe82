"""Fully sharded data parallelism (FSDP2): weights, gradients and optimizer state are cut over the ranks."""

import warnings

from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from ultrathink_model.distributed.single import SingleStrategy
from ultrathink_model.models.multimodal.encoder_block import EncoderBlock


class FSDPStrategy(SingleStrategy):
    """`fully_shard` on each block and on the rest, with gradients summed instead of averaged.

    A block's weights are gathered when it runs and dropped after it. `distributed.cpu_offload` keeps the shards in
    host memory, where the optimizer then runs too.
    """

    name = "fsdp"
    keeps_casts = False
    is_sharded = True

    def backward(self, loss: Float[Tensor, ""], is_last_micro_step: bool) -> None:
        """Adds a micro-batch's gradient; ranks exchange theirs in the last one."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_is_last_backward(is_last_micro_step)
        self.model.set_requires_gradient_sync(is_last_micro_step)
        super().backward(loss, is_last_micro_step)

    def _wrap(self, model: nn.Module) -> nn.Module:
        # True of a block that is routed in depth, and harmless: the decoder changes no block's output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        device = self.context.device
        if self.tensors:
            mesh = self.tensors.grid["dp"]
        else:
            mesh = init_device_mesh(device.type, (self.context.world_size,), mesh_dim_names=("dp_shard",))
        offload = self.config.distributed.cpu_offload and device.type != "cpu"
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        experts = set(self.experts.parameters.values()) if self.experts else set()
        for unit in (*self._units(model), model):
            fully_shard(unit, mesh=mesh, offload_policy=policy, ignored_params=experts)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Gloo can only add; NCCL's average would need gradient_scale to be the world size.
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        return model

    def _units(self, model: nn.Module) -> list[nn.Module]:
        """What is gathered at once: the decoder's blocks, and the encoders'."""
        blocks = model.get_submodule("blocks")
        assert isinstance(blocks, nn.ModuleList)
        return [*blocks, *(module for module in model.modules() if isinstance(module, EncoderBlock))]
