"""A trunk and a small head on its states, updated together."""

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW

from ultrathink_model.alignment.precision import in_run_precision
from ultrathink_model.alignment.sequences import Forward
from ultrathink_model.config import Config
from ultrathink_model.data.batch import Batch
from ultrathink_model.distributed.context import RankContext, all_reduce_sum
from ultrathink_model.distributed.state import load_optimizer_state, optimizer_state
from ultrathink_model.distributed.strategy import make_strategy
from ultrathink_model.models.transformer import Transformer


class Learner:
    """A language model under the run's strategy with a head that every rank holds whole.

    The head stays outside the strategy, which knows decoders only; its few weights' gradients are summed here. Both
    have AdamW without weight decay, which would pull the policy towards zero instead of towards its reference. The
    trunk stays in evaluation mode (see `response_states`). Where the strategy cuts the trunk's weights over the ranks,
    each rank has a whole copy beside its shard, which generates and is brought up to date when it is asked for.

    Args:
        config: Clipping, AdamW's constants and the strategy.
        context: This rank.
        trunk: The language model; alike on every rank.
        head: Reads the trunk's hidden states; alike on every rank. None for none.
        learning_rate: Of the trunk.
        head_learning_rate: Of the head.
    """

    def __init__(
        self,
        config: Config,
        context: RankContext,
        trunk: Transformer,
        head: nn.Module | None,
        learning_rate: float,
        head_learning_rate: float,
    ) -> None:
        self.context = context
        self._max_norm = config.training.gradient_clipping
        self._strategy = make_strategy(config, context)
        self._whole: Transformer | None = None
        if self._strategy.is_sharded:
            self._whole = copy.deepcopy(trunk).to(context.device).eval().requires_grad_(False)
        if self._strategy.name != "single":
            _give_every_weight_a_gradient(trunk)
        self._strategy.prepare(trunk, lambda module: _adamw(config, module, learning_rate))
        self._strategy.model.eval()
        self._whole_is_stale = False
        self.forward: Forward = in_run_precision(config, cast(Forward, self._strategy.model), context.device)
        self.head = None if head is None else head.to(context.device)
        self._head_optimizer = None if self.head is None else _adamw(config, self.head, head_learning_rate)
        self._rates = (learning_rate, head_learning_rate)

    @property
    def strategy_name(self) -> str:
        """How the ranks share the trunk."""
        return self._strategy.name

    def whole_trunk(self) -> Transformer:
        """The trunk as it stands, for generation and for saving; every rank calls it together."""
        if self._whole is None:
            return self._trunk
        if self._whole_is_stale:
            self._strategy.copy_weights_to(self._whole)
            self._whole_is_stale = False
        return self._whole

    def load_trunk(self, weights: dict[str, Tensor]) -> None:
        """Puts the trunk to whole weights and buffers, alike on every rank."""
        self._strategy.load_weights(weights)
        self._whole_is_stale = True

    def backward(self, loss: Float[Tensor, ""], is_last: bool = True) -> None:
        """Adds the gradient of a loss that is this rank's part of a sum over ranks.

        Args:
            loss: Made by `forward` and the head.
            is_last: Whether a step follows; ranks exchange gradients only then.
        """
        self._strategy.backward(loss * self._strategy.gradient_scale, is_last)

    def add_language_model_gradient(
        self, batches: Iterable[Batch], weight: float, step: int, is_last: bool = False
    ) -> tuple[int, float]:
        """Adds `weight` times the gradient of pretraining's objective, which the next step takes along (PPO-ptx).

        The trunk is in training mode for it, and so routes and balances as in pretraining; what it counts takes
        effect at `end_routing_step`, so that the round's probabilities stay those of one function.

        Args:
            batches: This rank's micro-batches of one step; from `TrainLoader`.
            weight: `rlhf.ptx_weight`.
            step: Optimizer step in pretraining's count, which the reasoning engine's annealing goes by.
            is_last: Whether a step follows without any other gradient.

        Returns:
            Tokens over all ranks, and their mean loss in nats.
        """
        batches = list(batches)
        tokens = int(all_reduce_sum(torch.tensor(sum(batch.num_tokens for batch in batches))))
        self._trunk.begin_step(step)
        self._strategy.model.train()
        total = torch.zeros((), device=self.context.device)
        for number, batch in enumerate((batch.to(self.context.device) for batch in batches), start=1):
            output = self.forward(
                batch.input_ids,
                labels=batch.labels,
                document_ids=batch.document_ids,
                source_groups=batch.source_groups,
                harm_labels=batch.harm_labels,
                media=batch.media,
            )
            assert output.loss_sum is not None
            objective = sum(output.aux_losses.values(), output.loss_sum)
            self.backward(objective * (weight / max(1, tokens)), is_last=is_last and number == len(batches))
            total += output.loss_sum.detach()
        self._strategy.model.eval()
        return tokens, float(all_reduce_sum(total)) / max(1, tokens)

    def end_routing_step(self) -> None:
        """Lets loads and thresholds follow what training mode has counted."""
        self._trunk.end_step(all_reduce_sum)
        self._whole_is_stale = True

    def step(self) -> Float[Tensor, ""]:
        """Clips and moves the weights; a gradient that is not finite moves nothing.

        Returns:
            The norm of the trunk's gradient before clipping.
        """
        norm = self._strategy.gradient_norm_and_clip(self._max_norm)
        if not torch.isfinite(norm):
            self._strategy.skip_step()
            self._zero_head()
            return norm
        self._strategy.step()
        self._whole_is_stale = True
        if self.head is not None and self._head_optimizer is not None:
            for parameter in self.head.parameters():
                assert parameter.grad is not None, "the head takes part in every loss"
                # `backward` has scaled the loss for a strategy that averages over the ranks; this is their sum.
                all_reduce_sum(parameter.grad).div_(self._strategy.gradient_scale)
            if self._max_norm is not None:
                nn.utils.clip_grad_norm_(self.head.parameters(), self._max_norm)
            self._head_optimizer.step()
        self._zero_head()
        return norm

    def scale_rates(self, factor: float) -> None:
        """Sets both learning rates to `factor` of what they were made with."""
        optimizers = (self._strategy.optimizer, self._head_optimizer)
        for optimizer, rate in zip(optimizers, self._rates, strict=True):
            for group in () if optimizer is None else optimizer.param_groups:
                group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state of trunk and head, as tensors by name."""
        state = self._strategy.state_dict()
        if self.head is not None and self._head_optimizer is not None:
            state["head"] = self.head.state_dict()
            state["head_optimizer"] = optimizer_state(self._head_optimizer, self.head)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._strategy.load_state_dict(state)
        self._whole_is_stale = True
        if self.head is not None and self._head_optimizer is not None:
            self.head.load_state_dict(state["head"])
            load_optimizer_state(self._head_optimizer, self.head, state["head_optimizer"])

    @property
    def _trunk(self) -> Transformer:
        return cast(Transformer, self._strategy.unwrapped)

    def _zero_head(self) -> None:
        if self._head_optimizer is not None:
            self._head_optimizer.zero_grad()


def _give_every_weight_a_gradient(trunk: Transformer) -> None:
    """Has each rank's backward pass reach every weight in evaluation mode too, be it with zeros.

    There tokens pass over blocks, and so do gradients; a strategy waits for all of them. A block's weights are touched
    where it ends, while FSDP still holds them, the others at the final norm. ZeRO 3 has let go of them by then and
    leaves them empty: with it every rank must run the same parts (see `check_alignment`).
    """
    in_blocks = {parameter for block in trunk.blocks for parameter in block.parameters()}
    others = [parameter for parameter in trunk.parameters() if parameter not in in_blocks]

    def touch(module: nn.Module, value: Tensor, weights: Iterable[nn.Parameter]) -> Tensor:
        if module.training or not torch.is_grad_enabled():
            return value
        return value + 0 * sum(weight.sum() for weight in weights if weight.requires_grad and weight.numel())

    def touch_block(block: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return touch(block, output[0], block.parameters()), output[1]

    for block in trunk.blocks:
        block.register_forward_hook(touch_block)
    trunk.norm.register_forward_hook(lambda norm, _inputs, output: touch(norm, output, others))


def _adamw(config: Config, module: nn.Module, rate: float) -> AdamW:
    training = config.training
    betas = (training.adam_beta1, training.adam_beta2)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return AdamW(parameters, lr=rate, betas=betas, eps=training.adam_eps, weight_decay=0.0, fused=True)
