"""Distributed data parallelism: every rank holds the model, gradients are added up."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ultrathink_model.distributed.single import SingleStrategy


class DDPStrategy(SingleStrategy):
    """PyTorch's DDP, with gradients summed instead of averaged.

    DDP's own way to leave out the exchange of all but the last micro-step, `no_sync`, must be entered before the
    forward pass. Ours decides in the hook that does the exchange, at the time of the backward pass.
    """

    name = "ddp"

    def backward(self, loss: Float[Tensor, ""], is_last_micro_step: bool) -> None:
        """Adds a micro-batch's gradient; with the last one, buckets are summed as they fill."""
        self._exchanges = is_last_micro_step
        super().backward(loss, is_last_micro_step)
        if self.tensors and is_last_micro_step:
            self.tensors.sum_over_data()

    def _wrap(self, model: nn.Module) -> nn.Module:
        self._data_group = self.tensors.grid.get_group("dp") if self.tensors else None
        ignored = [name for axis in (self.experts, self.tensors) if axis for name in axis.parameters]
        if ignored:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        # Buffers change alike on all ranks, from counts that were summed over them.
        wrapped = DistributedDataParallel(
            model, process_group=self._data_group, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        wrapped.register_comm_hook(None, self._sum_bucket)
        return wrapped

    def _sum_bucket(self, _state: None, bucket: dist.GradBucket) -> Future[torch.Tensor]:
        if self._exchanges:
            work = dist.all_reduce(bucket.buffer(), group=self._data_group, async_op=True)
            assert work is not None
            return work.get_future().then(lambda future: future.value()[0])
        done: Future[torch.Tensor] = Future()
        done.set_result(bucket.buffer())
        return done
