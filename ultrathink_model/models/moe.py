"""Mixture of experts in place of a feed-forward."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ultrathink_model.config import Config
from ultrathink_model.media.batch import MODALITIES
from ultrathink_model.models.dispatch import Dispatch, grouped_linear, sum_copies, take_copies, take_weights
from ultrathink_model.models.precision import autocast_dtype
from ultrathink_model.models.routing import Routing
from ultrathink_model.models.swiglu import swiglu
from ultrathink_model.models.tokens import Tokens

NUM_SOURCE_GROUPS = 4

ApplyExperts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# From rows, weights, dispatch and the experts' matrices to mixed rows; None where it cannot take them.
MixExperts = Callable[[Tensor, Tensor, Dispatch, Tensor, Tensor], Tensor | None]


def apply_experts(
    copies: Float[Tensor, "copies hidden"],
    scale: Float[Tensor, "copies 1"],
    ends: Int[Tensor, " experts"],
    gate_up: Float[Tensor, "experts double_width hidden"],
    down: Float[Tensor, "experts hidden width"],
) -> Float[Tensor, "copies hidden"]:
    """`scale · down_e(silu(gate_e(x)) · up_e(x))` of rows sorted by expert; those past the last end are undefined."""
    # A scale on the inner units does what one on the output would, with less to keep for the backward pass.
    return grouped_linear(swiglu(grouped_linear(copies, gate_up, ends), scale), down, ends)


class MixtureOfExperts(nn.Module):
    """Qwen3-MoE's mixture: softmax over a linear router, the top-k experts, their weights brought to sum 1.

    `y = Σ_e w_e · down_e(silu(gate_e(x)) · up_e(x))`, `w = p / Σ p` over the k largest of `p = softmax(router(x))`.
    Copies of the tokens are sorted by expert for grouped matrix products. Router and losses are in float32.

    Each loss is a sum over tokens. That holds for the load-balance loss, too, `weight · E · Σ_tokens Σ_e f_e p_e`
    (Fedus et al. 2021, arXiv 2101.03961), because its load f is the whole step's before this one: only p carries a
    gradient there, and a load over one micro-batch would balance the parts in place of the batch (Qiu et al. 2025,
    arXiv 2501.11873) and make the loss depend on how the batch is cut.

    With `moe.router_bias_rate`, the k largest of `router(x) + bias` are taken, at the weights that p gives them; the bias
    follows the loads by its sign (Wang et al. 2024, arXiv 2408.15664, whose scores are sigmoids).
    """

    expert_load: Tensor
    router_bias: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        moe, hidden_size = config.moe, config.model.hidden_size
        self.options = moe
        self.num_experts = moe.num_experts
        self.top_k = moe.moe_top_k
        self.group_sizes = tuple(moe.group_sizes.values())
        self.has_media = config.advanced.enable_multimodal
        width = moe.expert_hidden_size or config.model.feed_forward_size // moe.moe_top_k
        self.router = nn.Linear(hidden_size, self.num_experts, bias=False)
        # One matrix an expert, (out, in) as in nn.Linear, the gate's rows before the up's: transformers' layout.
        self.gate_up = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        # Expert parallelism puts its own in place of it.
        self.apply_experts: ApplyExperts = apply_experts
        # `native.kernels.use_native_kernels` puts its own here.
        self.native: MixExperts | None = None
        # Share of the previous step's copies that each expert took.
        self.register_buffer("expert_load", torch.empty(self.num_experts))
        self.register_buffer("router_bias", torch.empty(self.num_experts) if moe.router_bias_rate else None)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, spread: float, residual_spread: float) -> None:
        """Draws the experts; the router is a Linear of its own. Loads start uniform, biases at zero."""
        self.gate_up.normal_(0.0, spread, generator=generator)
        self.down.normal_(0.0, residual_spread, generator=generator)
        self.expert_load.fill_(1 / self.num_experts)
        if self.router_bias is not None:
            self.router_bias.zero_()

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], tokens: Tokens
    ) -> tuple[Float[Tensor, "batch seq hidden"], Routing]:
        """The weighted experts of each token; in training also the losses and counts of their choice."""
        rows = x.flatten(0, 1)  # (tokens, hidden)
        logits = self._router_logits(rows)  # (tokens, experts)
        log_partition = logits.logsumexp(dim=1, keepdim=True)
        probabilities = (logits - log_partition).exp()
        if self.router_bias is None:
            weights, experts = probabilities.topk(self.top_k, dim=1)  # (tokens, top_k)
        else:
            experts = (logits + self.router_bias).topk(self.top_k, dim=1).indices
            weights = probabilities.gather(1, experts)
        weights = weights / weights.sum(dim=1, keepdim=True)
        valid = None if tokens.valid is None else tokens.valid.flatten()
        if valid is not None:
            experts = experts.masked_fill(~valid.unsqueeze(1), self.num_experts)
        dispatch = Dispatch.sort(experts, self.num_experts)
        kept = dispatch
        if self.training and self.options.expert_capacity is not None:
            kept = self._within_capacity(dispatch, experts, self.options.expert_capacity)
        mixed = self._mix(rows, weights, kept, may_leave_rows=kept is not dispatch or valid is not None)
        if not self.training:
            return mixed.view_as(x), Routing()
        losses = self._losses(logits, log_partition.squeeze(1), probabilities, tokens, valid)
        counts = self._counts(logits - log_partition, probabilities, experts, dispatch, kept, tokens, valid)
        return mixed.view_as(x), Routing(losses, counts)

    def _router_logits(self, rows: Tensor) -> Tensor:
        """Router logits in float32, or in float64 for such a model, whatever autocast says."""
        exact = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(exact)
            if self.training and self.options.router_jitter:
                jitter = self.options.router_jitter
                rows = rows * torch.empty_like(rows).uniform_(1 - jitter, 1 + jitter)
            return F.linear(rows, self.router.weight.to(exact))

    def _within_capacity(self, dispatch: Dispatch, experts: Tensor, capacity: float) -> Dispatch:
        """The dispatch without the copies that come to an expert after it is full."""
        most = math.ceil(capacity * experts.numel() / self.num_experts)
        first = F.pad(dispatch.ends, (1, 0))[experts]  # place of the first copy of each copy's expert
        return Dispatch.sort(experts.masked_fill(dispatch.places - first >= most, self.num_experts), self.num_experts)

    def _mix(self, rows: Tensor, weights: Tensor, dispatch: Dispatch, may_leave_rows: bool) -> Tensor:
        dtype = autocast_dtype(rows)
        rows, weights = rows.to(dtype), weights.to(dtype)
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        mixed = None if self.native is None else self.native(rows, weights, dispatch, gate_up, down)
        if mixed is not None:
            return mixed
        copies, scale, taken = take_copies(rows, dispatch), take_weights(weights, dispatch), None
        if may_leave_rows:
            # Copies of no expert come out of the grouped products undefined, forwards and backwards.
            taken = torch.arange(copies.shape[0], device=copies.device).unsqueeze(1) < dispatch.ends[-1]
            copies, scale = copies.where(taken, 0.0), scale.where(taken, 0.0)
        mixed = self.apply_experts(copies, scale, dispatch.ends, gate_up, down)
        return sum_copies(mixed if taken is None else mixed.where(taken, 0.0), dispatch)

    def _losses(
        self, logits: Tensor, log_partition: Tensor, probabilities: Tensor, tokens: Tokens, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """The weighted losses that have a weight, each a sum over the tokens that are no padding."""
        real = torch.ones_like(log_partition) if valid is None else valid.to(log_partition.dtype)
        options = self.options
        losses = {}
        if options.load_balance_weight:
            balance = (probabilities @ self.expert_load.to(probabilities.dtype)) @ real
            losses["moe/load_balance"] = options.load_balance_weight * self.num_experts * balance
        if options.router_z_loss_weight:
            losses["moe/router_z"] = options.router_z_loss_weight * (log_partition.square() @ real)
        if options.group_loss_weight and tokens.source_groups is not None:
            losses["moe/group"] = options.group_loss_weight * self._group_loss(logits, log_partition, tokens, real)
        return losses

    def _group_loss(self, logits: Tensor, log_partition: Tensor, tokens: Tokens, real: Tensor) -> Tensor:
        """Sum over tagged tokens of `-log` of the probability mass of their group's experts."""
        assert tokens.source_groups is not None
        groups = tokens.source_groups.flatten()
        mass = torch.stack([part.logsumexp(dim=1) for part in logits.split(self.group_sizes, dim=1)], dim=1)
        own = mass.gather(1, groups.clamp_min(0).unsqueeze(1)).squeeze(1)
        return (log_partition - own).where(groups >= 0, 0.0) @ real

    @torch.no_grad()
    def _counts(
        self,
        log_probabilities: Tensor,
        probabilities: Tensor,
        experts: Int[Tensor, "tokens top_k"],
        dispatch: Dispatch,
        kept: Dispatch,
        tokens: Tokens,
        valid: Tensor | None,
    ) -> dict[str, Tensor]:
        load = dispatch.ends.diff(prepend=dispatch.ends.new_zeros(1)).float()
        entropy = -(probabilities * log_probabilities).sum(dim=1)
        real = torch.ones_like(entropy) if valid is None else valid.to(entropy.dtype)
        return {
            "moe/load": load,
            "moe/tokens": real.sum(),
            "moe/entropy": entropy @ real / math.log(max(self.num_experts, 2)),
            "moe/group_share": self._group_counts(experts, tokens),
            **self._modality_counts(experts, tokens),
            "moe/dropped": (dispatch.ends[-1] - kept.ends[-1]).float(),
        }

    def _group_counts(self, experts: Tensor, tokens: Tokens) -> Float[Tensor, "sources groups"]:
        """Copies of each source group's tokens (rows) that went to each expert group (columns)."""
        counts = torch.zeros(NUM_SOURCE_GROUPS, len(self.group_sizes), device=experts.device)
        if tokens.source_groups is None:
            return counts
        sizes = torch.tensor(self.group_sizes, device=experts.device)
        group_of_expert = torch.searchsorted(sizes.cumsum(0), experts, right=True)  # no expert: one past the last
        sources = F.one_hot(tokens.source_groups.flatten() + 1, NUM_SOURCE_GROUPS + 1)[:, 1:].float()
        return sources.T @ F.one_hot(group_of_expert, len(sizes) + 1)[..., :-1].sum(dim=1).float()

    def _modality_counts(self, experts: Tensor, tokens: Tokens) -> dict[str, Float[Tensor, "modalities experts"]]:
        """Copies of the tokens of text, of images and of sounds that went to each expert, where the model has encoders."""
        if not self.has_media:
            return {}
        grid = experts.new_zeros(experts.shape[0]) if tokens.modalities is None else tokens.modalities.flatten()
        # Copies of no expert go to a column of their own, which is cut off.
        places = (grid.unsqueeze(1) * (self.num_experts + 1) + experts).flatten()
        counts = torch.zeros(len(MODALITIES) * (self.num_experts + 1), device=experts.device)
        counts = counts.index_add(0, places, torch.ones_like(places, dtype=counts.dtype))
        return {"moe/modality_load": counts.view(len(MODALITIES), -1)[:, :-1]}

    @torch.no_grad()
    def end_step(self, counts: dict[str, Tensor]) -> None:
        """Takes the finished step's loads as those that the next step's load-balance loss refers to; moves the bias."""
        load = counts.get("moe/load")
        if load is None:
            return
        total = load.sum()
        self.expert_load.copy_(torch.where(total > 0, load / total, self.expert_load))
        if self.router_bias is not None:
            self.router_bias += self.options.router_bias_rate * (load.mean() - load).sign()

    @staticmethod
    def statistics(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The counts of all blocks as shares.

        Returns:
            `moe/load` (layers, experts): share of copies each expert was chosen for; `moe/entropy` (): mean entropy of
            the router, 1 where it is uniform; `moe/dropped` (): share of copies over capacity; `moe/group_share`
            (sources, groups): where the copies of each source group's tokens went, NaN in rows of groups without;
            `moe/modality_load` (modalities, layers, experts): the load by the copies of each modality's tokens alone, NaN
            for one that no token had, where the model has encoders.
        """
        mixtures = [counts for counts in layers if "moe/load" in counts]
        if not mixtures:
            return {}
        load = torch.stack([counts["moe/load"] for counts in mixtures])
        tokens, entropy, dropped, groups = (
            torch.stack([counts[name] for counts in mixtures]).sum(dim=0)
            for name in ("moe/tokens", "moe/entropy", "moe/dropped", "moe/group_share")
        )
        statistics = {
            "moe/load": load / load.sum(dim=1, keepdim=True),
            "moe/entropy": entropy / tokens,
            "moe/dropped": dropped / load.sum(),
            "moe/group_share": groups / groups.sum(dim=1, keepdim=True),
        }
        if "moe/modality_load" in mixtures[0]:
            by_modality = torch.stack([counts["moe/modality_load"] for counts in mixtures], dim=1)
            statistics["moe/modality_load"] = by_modality / by_modality.sum(dim=2, keepdim=True)
        return statistics
