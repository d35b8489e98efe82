"""Muon for matrices and AdamW for the rest, as one optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ultrathink_model.errors import ConfigError
from ultrathink_model.training.orthogonal import orthogonalise, orthogonalise_over_ranks

# Most weights whose updates are gathered and orthogonalised at once; it bounds the memory that a step takes.
BATCH_WEIGHTS = 1 << 26


class Muon(Optimizer):
    """Muon for the groups whose `rule` is `muon`, AdamW for those whose `rule` is `adamw`.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): M ← μM + (1 - μ)G, and the weights move
    by lr · sqrt(max(1, rows / columns)) along the orthogonal factor of (1 - μ)G + μM, Nesterov's look-ahead.
    Ours takes matrices of one shape as one batch, stacks of experts among them, takes a weight that holds several
    matrices apart, and shares the work out over the ranks. Weight decay is decoupled in both rules.

    Weights may be tensors that every rank holds alike, or FSDP2's `DTensor`s. A `found_inf` attribute, as
    `torch.amp.GradScaler` and the trainer set it, makes `step` change nothing when it is not 0; on a GPU that
    costs no wait for the device.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        parts: Mapping[Tensor, tuple[int, ...]] | None = None,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        """Prepares the state.

        Args:
            groups: Each with `params`, `rule`, `lr` and `weight_decay`.
            momentum: Muon's μ.
            betas: AdamW's decay of the first and second moment.
            eps: AdamW's term against division by zero.
            parts: Rows of each matrix in a weight that holds several, one above the other.
            product_dtype: Number format of the iteration's matrix products; None takes the weights'.

        Raises:
            ConfigError: A weight under `muon` is not a matrix, as when DeepSpeed ZeRO flattens the weights.
        """
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})
        self._parts = dict(parts or {})
        self._product_dtype = product_dtype
        for group in self.param_groups:
            for parameter in group["params"] if group["rule"] == "muon" else ():
                _require_matrix(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves the weights that have a gradient."""
        assert closure is None, "the trainer computes the gradients"
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and not found_inf.is_cuda and found_inf:
            return
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if grad_scale is not None:
                torch._foreach_div_([_local(parameter.grad) for parameter in parameters], grad_scale)
            if group["rule"] == "muon":
                self._muon_step(group, parameters, found_inf)
            else:
                self._adamw_step(group, parameters, found_inf)

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor], found_inf: Tensor | None) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            [_local(parameter) for parameter in parameters],
            [_local(parameter.grad) for parameter in parameters],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon_step(self, group: dict[str, Any], parameters: list[Tensor], found_inf: Tensor | None) -> None:
        for parameter in parameters:
            _require_matrix(parameter)
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        keep: float | Tensor = 1.0
        if found_inf is not None:
            # What is not finite would survive a product with 0, so it is taken out of the gradients first.
            keep = 1 - found_inf
            for parameter in parameters:
                _local(parameter.grad).masked_fill_(found_inf != 0, 0)
        gradients = [_local(parameter.grad) for parameter in parameters]
        buffers = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        momentum = group["momentum"]
        change = torch._foreach_sub(gradients, buffers)
        torch._foreach_mul_(change, (1 - momentum) * keep)
        torch._foreach_add_(buffers, change)
        weights = [_local(parameter) for parameter in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * keep)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        for batch in _batches(parameters):
            directions = self._directions([parameters[i] for i in batch], [updates[i] for i in batch])
            for index, direction in zip(batch, directions, strict=True):
                weights[index].sub_(direction.mul_(group["lr"] * keep))

    def _directions(self, parameters: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Where each weight goes at a learning rate of 1, cut over the ranks as the weight is.

        Args:
            parameters: The weights, all cut in one way.
            updates: This rank's part of each weight's update.
        """
        parts = [self._parts.get(parameter, parameter.shape[-2:-1]) for parameter in parameters]
        dtype = self._product_dtype
        if _holds_whole_matrices(parameters[0]):
            # Each rank has matrices of its own: there is nothing to gather and nothing to share out.
            return _matrix_directions(updates, parts, dtype, orthogonalise)
        whole = [_gathered(update, parameter) for update, parameter in zip(updates, parameters, strict=True)]
        directions = _matrix_directions(whole, parts, dtype, orthogonalise_over_ranks)
        return [_cut(direction, parameter) for direction, parameter in zip(directions, parameters, strict=True)]


def _batches(parameters: list[Tensor]) -> Iterator[list[int]]:
    """Indices of the weights that are cut over the ranks in one way, in batches of bounded size."""
    alike: dict[bool, list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        alike[_holds_whole_matrices(parameter)].append(index)
    for indices in alike.values():
        batch: list[int] = []
        size = 0
        for index in indices:
            if batch and size + parameters[index].numel() > BATCH_WEIGHTS:
                yield batch
                batch, size = [], 0
            batch.append(index)
            size += parameters[index].numel()
        yield batch


def _matrix_directions(
    updates: list[Tensor],
    parts: list[tuple[int, ...]],
    dtype: torch.dtype | None,
    solve: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """sqrt(max(1, rows / columns)) times the orthogonal factor of each matrix, matrices of one shape as one batch."""
    directions = [torch.empty_like(update) for update in updates]
    alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for update, direction, rows in zip(updates, directions, parts, strict=True):
        for matrix, target in zip(update.split(rows, dim=-2), direction.split(rows, dim=-2), strict=True):
            # Wide, as the iteration wants it, so that a matrix and one of the transposed shape share a batch.
            tall = matrix.shape[-2] > matrix.shape[-1]
            source, sink = (matrix.mT, target.mT) if tall else (matrix, target)
            alike[(source.shape[-2], source.shape[-1])].append((source, sink))
    for (short, long), pairs in alike.items():
        factors = solve(torch.cat([source.to(dtype).reshape(-1, short, long) for source, _ in pairs]))
        for factor, (_, sink) in zip(factors.split([s.shape[:-2].numel() for s, _ in pairs]), pairs, strict=True):
            sink.copy_(factor.reshape(sink.shape))
    for direction, rows in zip(directions, parts, strict=True):
        for target in direction.split(rows, dim=-2):
            target.mul_(max(1.0, target.shape[-2] / target.shape[-1]) ** 0.5)
    return directions


def _holds_whole_matrices(parameter: Tensor) -> bool:
    """Whether a rank's part of a stack of experts is a number of whole experts."""
    return (
        isinstance(parameter, DTensor)
        and parameter.ndim > 2
        and all(isinstance(cut, Replicate) or (isinstance(cut, Shard) and cut.dim == 0) for cut in parameter.placements)
    )


def _gathered(update: Tensor, parameter: Tensor) -> Tensor:
    """The whole of an update of which this rank holds the part that it holds of the weight."""
    if not isinstance(parameter, DTensor):
        return update
    mesh, placements = parameter.device_mesh, parameter.placements
    part = DTensor.from_local(update, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    return part.full_tensor()


def _cut(direction: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole direction."""
    if not isinstance(parameter, DTensor):
        return direction
    return _local(distribute_tensor(direction, parameter.device_mesh, parameter.placements, src_data_rank=None))


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _require_matrix(parameter: Tensor) -> None:
    if parameter.ndim < 2:
        raise ConfigError(
            f"training.optimizer=muon moves matrices, and this strategy hands it a flat weight of shape "
            f"{tuple(parameter.shape)}, as DeepSpeed ZeRO does; take training.optimizer=adamw, or "
            "distributed.strategy=fsdp to shard with muon"
        )
