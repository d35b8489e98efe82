"""DeepSpeed ZeRO 1, 2 and 3: optimizer state, gradients and weights cut over the ranks."""

import copy
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._common_utils import collect_grad_tensors
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.deepspeed_config import deepspeed_config, require_deepspeed
from ultrathink_model.distributed.interface import MakeOptimizer, Strategy
from ultrathink_model.distributed.state import initialise_state, require_same_names
from ultrathink_model.errors import ConfigError


class DeepSpeedStrategy(Strategy):
    """A DeepSpeed engine around the model, with our optimizer and our schedule.

    Its own checkpoints are pickles bound to a number of ranks, so its state goes through the common form instead:
    each tensor is gathered, one at a time, and cut again into DTensors that torch.distributed.checkpoint writes
    shard by shard.
    """

    name = "deepspeed"

    def __init__(self, config: Config, context: RankContext) -> None:
        super().__init__(config, context)
        require_deepspeed()
        if config.training.optimizer == "muon":
            raise ConfigError(
                "training.optimizer=muon moves whole matrices, and distributed.strategy=deepspeed cuts weights into "
                "flat pieces; take training.optimizer=adamw, or distributed.strategy=fsdp"
            )
        if config.training.use_amp and config.training.amp_dtype == "fp16":
            raise ConfigError(
                "training.amp_dtype=fp16 needs a loss scaler, which distributed.strategy=deepspeed does not take from "
                "us; take training.amp_dtype=bf16, or distributed.strategy=fsdp"
            )
        # ZeRO averages the ranks' gradients.
        self.gradient_scale = float(context.world_size)
        self._settings = deepspeed_config(config, context)
        self.is_sharded = self._settings["zero_optimization"]["stage"] == 3

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Hands the model and its optimizer to a DeepSpeed engine."""
        deepspeed = import_deepspeed()
        self.unwrapped = self._move_to_device(model)
        self.optimizer = make_optimizer(self.unwrapped)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        engine, *_ = deepspeed.initialize(model=self.unwrapped, optimizer=self.optimizer, config=self._settings)
        self.model = self._engine = engine
        self._zero = _Zero(engine.optimizer, engine.zero_optimization_stage())

    def backward(self, loss: Float[Tensor, ""], is_last_micro_step: bool) -> None:
        """Adds a micro-batch's gradient; ZeRO 2 and 3 exchange each one's, ZeRO 1 the last."""
        self._engine.set_gradient_accumulation_boundary(is_last_micro_step)
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradient_norm_and_clip(self, max_norm: float | None) -> Float[Tensor, ""]:
        """The norm of the gradient; the engine clips in `step`."""
        self._zero.optimizer.clip_grad = max_norm or 0.0
        return self._zero.gradient_norm()

    def step(self) -> None:
        """Moves the weights and forgets the gradient; one that is not finite moves nothing."""
        self._engine.step()

    def skip_step(self) -> None:
        """Forgets the gradient."""
        self._zero.forget_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state as DTensors cut along their first dimension, and buffers as they are."""
        self._zero.initialise_state()
        mesh = init_device_mesh(self.context.device.type, (self.context.world_size,))
        parameters = dict(self.unwrapped.named_parameters())
        keys = self._zero.state_keys()
        weights = {name: _cut(self._zero.weight(p), mesh) for name, p in parameters.items()}
        optimizer = {
            name: {
                **{key: _cut(self._zero.state(p, key), mesh) for key in keys},
                "step": self._zero.step_of(p).clone(),
            }
            for name, p in parameters.items()
        }
        return {"model": {**weights, **self._buffers()}, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a state in the common form into the engine's flat pieces."""
        self._zero.initialise_state()
        keys = self._zero.state_keys()
        parameters = dict(self.unwrapped.named_parameters())
        own = {name: dict.fromkeys([*keys, "step"], torch.empty(0)) for name in parameters}
        require_same_names(own, state["optimizer"])
        for name, parameter in parameters.items():
            self._zero.set_weight(parameter, _whole(state["model"][name]))
            for key in keys:
                self._zero.set_state(parameter, key, _whole(state["optimizer"][name][key]))
            self._zero.step_of(parameter).copy_(state["optimizer"][name]["step"])
        self._zero.optimizer.refresh_fp32_params()
        for name, buffer in self._buffers().items():
            buffer.copy_(state["model"][name])

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, self._zero.weight(parameter)) for name, parameter in self.unwrapped.named_parameters())
        yield from self._buffers().items()

    def _buffers(self) -> dict[str, Tensor]:
        parameters = {name for name, _ in self.unwrapped.named_parameters()}
        return {name: tensor for name, tensor in self.unwrapped.state_dict().items() if name not in parameters}


class _Zero:
    """The parts of DeepSpeed's ZeRO optimizers that we reach into, for the three stages alike."""

    def __init__(self, optimizer: Any, stage: int) -> None:
        self.optimizer = optimizer
        self._is_sharded = stage == 3
        if self._is_sharded:
            groups, self._flat = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
        else:
            groups, self._flat = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        self._group_of = {parameter: index for index, group in enumerate(groups) for parameter in group}

    @property
    def inner(self) -> Optimizer:
        """Our optimizer, over DeepSpeed's flat pieces."""
        return self.optimizer.optimizer

    def gradient_norm(self) -> Tensor:
        """The norm over all ranks; DeepSpeed's mark for one that is not finite, -1, becomes infinity."""
        from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: PLC0415 - see `import_deepspeed`

        if self._is_sharded:
            norm = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        else:
            norm = self.optimizer.scaled_global_norm()
        norm = torch.as_tensor(norm)
        return torch.where(norm < 0, torch.full_like(norm, torch.inf), norm)

    def forget_gradients(self) -> None:
        """Drops the gradients, those that are already reduced among them."""
        self.optimizer.zero_grad()
        if self._is_sharded:
            self.optimizer._overflow_clean_up(1.0)
        else:
            for index in list(self.optimizer.averaged_gradients):
                self.optimizer.averaged_gradients[index] = None
                self.optimizer.all_grad_tensors[index] = None
            self.optimizer._release_preflattened_grad_buffers()

    def initialise_state(self) -> None:
        """Makes the optimizer's state where no step has made it yet."""
        if self._is_sharded:
            # Between steps ZeRO-3 leaves our optimizer's groups empty.
            self.optimizer._set_fp32_optimizer_param_groups()
            initialise_state(self.inner)
            self.optimizer._clear_fp32_optimizer_param_groups()
        else:
            initialise_state(self.inner)
            # DeepSpeed 0.19 links weights to their state after the step of the first group, when those of the other
            # groups have none yet, and never again.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def state_keys(self) -> list[str]:
        """The tensors that the optimizer keeps for a weight, beside the count of its steps."""
        flat = self._flat[0]
        return [key for key, value in self.inner.state[flat].items() if getattr(value, "shape", None) == flat.shape]

    def step_of(self, parameter: Tensor) -> Tensor:
        """The count of steps of the piece that a weight lies in."""
        return self.inner.state[self._flat[self._group_of[parameter]]]["step"]

    def weight(self, parameter: Tensor) -> Tensor:
        """A weight, whole, on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param  # noqa: PLC0415 - see `import_deepspeed`

        return safe_get_full_fp32_param(parameter)

    def state(self, parameter: Tensor, key: str) -> Tensor:
        """A tensor of a weight's optimizer state, whole, on every rank."""
        from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415 - see `import_deepspeed`

        return safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets a weight in the model; `refresh_fp32_params` copies it to the optimizer's piece."""
        from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415 - see `import_deepspeed`

        with GatheredParameters([parameter], modifier_rank=0, enabled=self._is_sharded):
            parameter.copy_(value)

    def set_state(self, parameter: Tensor, key: str, value: Tensor) -> None:
        """Sets a tensor of a weight's optimizer state."""
        from deepspeed import utils  # noqa: PLC0415 - see `import_deepspeed`

        if not self._is_sharded:
            utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # DeepSpeed's own way to set the whole tensor fails where the ranks do not divide its size.
        piece = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        padded = value.new_zeros(piece * ranks)
        padded[: value.numel()] = value.flatten()
        utils.safe_set_local_optimizer_state(parameter, padded[piece * rank : piece * (rank + 1)], key)


def import_deepspeed() -> Any:
    """The package, quiet and without compiling anything; its import takes seconds and has side effects.

    On a CPU it would build an extension for exchanges in shared memory, for minutes and only where there is a
    compiler; gloo carries them as well.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it found no other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: PLC0415 - see above
        from deepspeed.runtime.zero import parameter_offload  # noqa: PLC0415

    # It still calls exchanges by the names that torch 2.13 gave up, at every step.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parameter_offload.apply_to_tensors_only = apply_to_tensors
    return deepspeed


def apply_to_tensors(function: Callable[[Tensor], Tensor], value: Any, warning_msg_fn: Any = None) -> Any:
    """The value with `function` applied to every tensor in it, dataclasses included.

    ZeRO-3 gathers a module's weights for the backward pass by hooks on the tensors of its outputs. Its own function
    does not look into dataclasses, which our modules return: a gradient that comes by an auxiliary loss would meet
    weights that are not there. A dataclass without a gradient inside is passed on as it is.
    """
    if isinstance(value, Tensor):
        touched = function(value)
        if hasattr(value, "ds_id") and not hasattr(touched, "ds_id"):
            touched.ds_param_alias = value  # type: ignore[attr-defined]
        return touched
    if isinstance(value, tuple | list):
        parts = [apply_to_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: apply_to_tensors(function, part) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and collect_grad_tensors(value):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if collect_grad_tensors(part):
                object.__setattr__(changed, field.name, apply_to_tensors(function, part))
        return changed
    return value


def _cut(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's share of a tensor that all ranks hold; scalars and vectors shorter than the mesh are cut too."""
    return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
