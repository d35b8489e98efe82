"""The state of an optimizer by the names of the weights, whatever the order of its groups."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ultrathink_model.errors import CheckpointError


def same_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in groups that one call may work on: whole ones, and those cut over the ranks of one mesh."""
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors, by weight and key; complete before its first step too."""
    initialise_state(optimizer)
    return {name: _tensors(optimizer.state[p]) for name, p in module.named_parameters() if p in optimizer.state}


def initialise_state(optimizer: Optimizer) -> None:
    """Has an optimizer make the state of weights that it has not moved yet, as zeros, and moves no weight.

    Optimizers make a weight's state in its first step. So that one is made with a rate and gradients of zero, which
    leaves the weights as they are; then what it counted is set to zero.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [parameter for parameter in parameters if not optimizer.state.get(parameter)]
    if not missing:
        return
    gradients = [parameter.grad for parameter in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = None
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for parameter in missing:
        for tensor in _tensors(optimizer.state[parameter]).values():
            tensor.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@torch.no_grad()
def load_optimizer_state(optimizer: Optimizer, module: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Copies a state by weight and key into an optimizer; tensors that already are its own stay.

    Raises:
        CheckpointError: The state is of another optimizer or another model.
    """
    own = optimizer_state(optimizer, module)
    require_same_names(own, state)
    for name, tensors in own.items():
        for key, tensor in tensors.items():
            if tensor is not state[name][key]:
                tensor.copy_(state[name][key])


def require_same_names(own: dict[str, dict[str, Tensor]], state: dict[str, dict[str, Any]]) -> None:
    """Refuses an optimizer state that has other weights or other keys."""
    own_names = {f"{name}: {key}" for name, tensors in own.items() for key in tensors}
    names = {f"{name}: {key}" for name, tensors in state.items() for key in tensors}
    if own_names != names:
        example = sorted(own_names ^ names)[0]
        raise CheckpointError(
            f"the saved optimizer state does not fit: {len(own_names - names)} of its tensors are missing there and "
            f"{len(names - own_names)} are foreign, such as {example}; resume with the training.optimizer that saved it"
        )


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
