"""Dynamic Reasoning Engine: a router gives each token as many passes of a block as it needs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ultrathink_model.config import Config
from ultrathink_model.config.model import ReasoningPath
from ultrathink_model.models.attention import LayerCache
from ultrathink_model.models.routing import Routing
from ultrathink_model.models.tokens import Rotation, Tokens

Residual = Callable[[Tensor, Tokens, Rotation, LayerCache | None], tuple[Tensor, Routing]]

# The paths by their passes of the block: fast none, standard one, deep two, ultra_deep three.
PATHS: tuple[ReasoningPath, ...] = ("fast", "standard", "deep", "ultra_deep")
MAX_PASSES = len(PATHS) - 1

# Sizes that the share of routed tokens takes while it is annealed: few, since each is compiled anew.
ANNEALING_LEVELS = 6
# Steps after the shares stopped falling in which the thresholds still follow each step's own rows.
SETTLING_STEPS = 10
# Share of the way to the threshold that would have suited a step's rows, which it then goes.
THRESHOLD_RATE = 0.5
# Share of the rows' room that the thresholds aim to fill: rows differ, and a full one turns tokens away.
FILLED = 0.94


class DepthRouter(nn.Module):
    """Mixture-of-Depths with further passes for the hardest tokens.

    A linear router gives each token a logit. The tokens whose logit exceeds a threshold make a first pass of the block,
    among themselves; of these, those above a second threshold make another, and those above a third a third. So the choice
    never depends on later tokens. In training, a pass has room for a fixed share of each row, which keeps shapes
    static: where more tokens ask for it, those with the highest logits get it, and where fewer do, the rest of the room
    is computed for nothing. Each step moves the thresholds so that the tokens nearly fill the room of all rows together.

    A pass changes the state by `gate · residual(state)`, so that the router learns from the language loss: the first pass's gate is
    `2 σ(logit)`, a further one's `tanh(strength) · 2 σ(logit)`. The router starts at zero and so do the strengths:
    every first gate is 1 and every further one 0, which is the dense model. Keys and values are those of the first
    pass; further passes read them again. Tokens that are passed over have none in this block.

    After Raposo et al. 2024 (Mixture-of-Depths, arXiv 2404.02258), with the shared keys of Bae et al. 2025
    (Mixture-of-Recursions, arXiv 2507.10524). Theirs trains on the highest of each row, however high, and routes causally
    by a second predictor; with ours, training and generation differ only where a row asks for more than its room.
    """

    thresholds: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        dre = config.dre
        self.router = nn.Linear(config.model.hidden_size, 1, bias=False)
        self.strengths = nn.Parameter(torch.empty(MAX_PASSES - 1))
        # Logit above which a token makes each pass.
        self.register_buffer("thresholds", torch.empty(MAX_PASSES))
        self.norm_eps = config.model.norm_eps
        self.warmup_steps = config.advanced.dre_warmup_steps
        self.final_shares: tuple[float, ...] = (dre.standard_share, dre.deep_share, dre.ultra_deep_share)
        self.forced = dre.force_path is not None
        if dre.force_path is not None:
            passes = PATHS.index(dre.force_path)
            self.final_shares = tuple(float(depth < passes) for depth in range(MAX_PASSES))
        self.shares = self.final_shares
        self.begin_step(0)

    @torch.no_grad()
    def initialise(self, _generator: torch.Generator, _spread: float, _residual_spread: float) -> None:
        """The state that leaves the dense function as it is."""
        self.router.weight.zero_()
        self.strengths.zero_()
        self.thresholds.copy_(torch.tensor([-math.inf, math.inf, math.inf]))

    def begin_step(self, step: int) -> None:
        """Sets the shares of tokens that make each pass: the first one's falls from 1 to its budget in warm-up."""
        first, *further = self.final_shares
        self.follows = step <= self.warmup_steps + SETTLING_STEPS
        if not self.forced and step < self.warmup_steps:
            progress = math.floor(ANNEALING_LEVELS * step / self.warmup_steps) / ANNEALING_LEVELS
            first = 1 - (1 - first) * progress
        self.shares = (first, *further)

    def forward(
        self,
        residual: Residual,
        x: Float[Tensor, "batch seq hidden"],
        tokens: Tokens,
        rotation: Rotation,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Routing]:
        """Each token's state after its passes, and their number; in training also where the choice was cut off."""
        logits = self.logits(x)
        visit = _Visit(residual, rotation, _FirstPassKeys(cache), row_length=x.shape[1])
        if not self.training:
            state, passes, routing = self._descend(0, visit, x, logits, tokens)
            return state, routing.merge(Routing(passes=(passes,)))
        # Data-parallel wrappers wait for a gradient of every parameter, so each is on every path, be it with weight 0.
        logits = logits + 0 * self.strengths.sum()
        state, passes, routing = self._descend(0, visit, x, logits, tokens)
        if not any(self.shares):
            first = tokens.select(torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device))
            change, _ = residual(x[:, :1], first, rotation, None)
            state = state + 0 * (change + logits[:, :1, None])
        routing.counts["dre/tokens"] = _count(tokens, x)
        return state, routing.merge(Routing(passes=(passes,)))

    def logits(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq"]:
        """The router's logit of each token, from its normalised state, in float32 or finer."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            normed = F.rms_norm(x.to(exact), x.shape[-1:], eps=self.norm_eps)
            return F.linear(normed, self.router.weight.to(exact)).squeeze(-1)

    def _descend(
        self, depth: int, visit: "_Visit", x: Tensor, logits: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor, Routing]:
        """The states after pass `depth` of the tokens that make it and whatever passes follow, and how many these are."""
        none = torch.zeros_like(logits, dtype=torch.uint8)
        if depth == MAX_PASSES:
            return x, none, Routing()
        choice = self._choose(depth, visit.row_length, logits, tokens)
        if choice.index is None:
            state, passes, routing = self._pass(depth, visit, x, logits, tokens)
        elif choice.index.shape[1] == 0:
            state, passes, routing = x, none, Routing()
        else:
            flat = (choice.index + _row_starts(logits)).flatten()
            chosen = x.flatten(0, 1).index_select(0, flat).view(*choice.index.shape, -1)  # (batch, chosen, hidden)
            visit.keys.select(choice.index, choice.tokens)
            state, passes, routing = self._pass(depth, visit, chosen, logits.gather(1, choice.index), choice.tokens)
            if choice.padding is not None:
                state, passes = chosen.where(choice.padding.unsqueeze(-1), state), passes * ~choice.padding
            state = x.flatten(0, 1).index_copy(0, flat, state.flatten(0, 1)).view_as(x)
            passes = none.flatten().index_copy(0, flat, passes.flatten()).view_as(none)
        return state, passes, routing.merge(Routing(counts=choice.counts))

    def _pass(
        self, depth: int, visit: "_Visit", x: Tensor, logits: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor, Routing]:
        """Pass `depth` of all these tokens and whatever passes follow, and how many these are."""
        change, routing = visit.residual(x, tokens, visit.rotation, visit.keys)
        gate = 2 * logits.sigmoid()
        if depth > 0:
            gate = gate * self.strengths[depth - 1].tanh()
        after = x + gate.unsqueeze(-1).to(x.dtype) * change
        state, further, deeper = self._descend(depth + 1, visit, after, logits, tokens)
        return state, further + 1, routing.merge(deeper)

    def _choose(self, depth: int, row_length: int, logits: Tensor, tokens: Tokens) -> "_Choice":
        if self.training:
            return self._choose_share(depth, row_length, logits, tokens)
        threshold = self.thresholds[depth]
        if self.forced:
            threshold = threshold.new_tensor(-math.inf if self.shares[depth] else math.inf)
        wanted = logits > threshold
        chosen = wanted if tokens.valid is None else wanted & tokens.valid
        numbers = chosen.sum(dim=1, keepdim=True)
        all_pass, most = torch.stack((wanted.all().long(), numbers.max())).tolist()
        if all_pass:
            return _Choice(None, tokens)
        index = chosen.logical_not().byte().argsort(dim=1, stable=True)[:, :most]
        valid = torch.arange(most, device=index.device) < numbers
        return _Choice(index, tokens.select(index, last_padded=~valid), padding=~valid)

    def _choose_share(self, depth: int, row_length: int, logits: Tensor, tokens: Tokens) -> "_Choice":
        """The tokens of each row above the threshold, as many as have room, with others behind them to fill it."""
        share, width = self.shares[depth], logits.shape[1]
        room = min(max(round(share * row_length), 1), width) if share else 0
        if room == width:
            return _Choice(None, tokens, counts={f"dre/passes/{depth}": _count(tokens, logits)})
        if room == 0:
            index = torch.zeros_like(logits[:, :0], dtype=torch.int64)
            return _Choice(index, tokens.select(index), counts={f"dre/passes/{depth}": logits.new_zeros(())})
        ranked = logits.detach()
        if tokens.valid is not None:
            ranked = ranked.masked_fill(~tokens.valid, -math.inf)
        highest = ranked.topk(room + 1, dim=1)
        threshold = self.thresholds[depth]
        # Before the first choice of this pass there is no threshold to keep to.
        padding = highest.values[:, :room] <= threshold.where(threshold.isfinite(), -math.inf)
        index, order = (highest.indices[:, :room] + width * padding).sort(dim=1)
        index, padding = index % width, padding.gather(1, order)
        counts = {f"dre/passes/{depth}": padding.logical_not().sum().float()}
        counts |= self._gap(depth, ranked, highest.values)
        return _Choice(index, tokens.select(index, last_padded=padding), padding, counts)

    def _gap(self, depth: int, logits: Tensor, highest: Tensor) -> dict[str, Tensor]:
        """What `end_step` learns of a pass's threshold, as sums over the rows that could fill their room.

        Args:
            depth: The pass.
            logits: Of all who could make it, -inf for those that are no tokens.
            highest: A row's highest, one more than it has room for.
        """
        room = highest.shape[1] - 1
        aim = max(1, math.ceil(FILLED * room))
        half = max(1, aim // 2)
        cut, upper = (highest[:, place - 1 : place + 1].mean(dim=1) for place in (aim, half))
        full = cut.isfinite()
        over = (logits > self.thresholds[depth]).sum(dim=1)
        # Logits between the highest half of those that should pass and the rest: where the threshold lies, outliers do not.
        slope = (upper if half < aim else highest[:, 0]) - cut
        sums = {
            "cut": cut,
            "excess": over - FILLED * room,
            "slope": slope / max(aim - half, 0.5),
            "cut_rows": torch.ones_like(cut),
        }
        return {f"dre/{name}/{depth}": values.where(full, 0.0).sum() for name, values in sums.items()}

    @torch.no_grad()
    def end_step(self, counts: dict[str, Tensor]) -> None:
        """Moves each threshold so that the tokens over it come nearer to filling the rows' room as far as is aimed at.

        In warm-up and shortly after it is set to the mean of the logits that would have done so in each row. As rows differ,
        that lets too many tokens pass in all, and with one step's rows now more and now fewer; so from then on it is
        moved by the tokens that were too many or too few, times the distance of two logits there.
        """
        for depth, share in enumerate(self.shares):
            rows = counts.get(f"dre/cut_rows/{depth}")
            if rows is None:
                if f"dre/passes/{depth}" in counts:
                    self.thresholds[depth] = -math.inf if share else math.inf
                continue
            cut, excess, slope = (counts[f"dre/{name}/{depth}"] / rows for name in ("cut", "excess", "slope"))
            before = self.thresholds[depth]
            moved = before + THRESHOLD_RATE * excess * slope
            after = cut if self.follows else moved.where(before.isfinite(), cut)
            self.thresholds[depth] = after.where(rows > 0, before)

    @staticmethod
    def statistics(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The counts of all routed blocks as shares.

        Returns:
            `dre/paths` (layers, 4): share of tokens on each path, fast to ultra-deep; `dre/compute` (): mean passes of
            a routed block per token.
        """
        routed = [counts for counts in layers if "dre/tokens" in counts]
        if not routed:
            return {}
        none = torch.zeros(())
        reached = torch.stack(
            [
                torch.stack(
                    [counts["dre/tokens"], *(counts.get(f"dre/passes/{d}", none) for d in range(MAX_PASSES)), none]
                )
                / counts["dre/tokens"]
                for counts in routed
            ]
        )
        return {"dre/paths": reached[:, :-1] - reached[:, 1:], "dre/compute": reached[:, 1:].sum(dim=1).mean()}


@dataclass(frozen=True)
class _Visit:
    """What stays the same over the passes of one call of a block."""

    residual: Residual
    rotation: Rotation
    keys: "_FirstPassKeys"
    row_length: int


@dataclass(frozen=True)
class _Choice:
    """The tokens that make a pass: `index` into each row, in order, or None for all.

    Rows with fewer chosen tokens than the longest are filled up with tokens that make no pass, the `padding`.
    """

    index: Int[Tensor, "batch chosen"] | None
    tokens: Tokens
    padding: Bool[Tensor, "batch chosen"] | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)


class _FirstPassKeys:
    """A cache whose first call goes to the block's own cache, if there is one, and whose later calls read it again."""

    def __init__(self, cache: LayerCache | None) -> None:
        self._cache = cache
        self._first: tuple[Tensor, Tensor, Tokens] | None = None
        self._mask: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the first pass; see `LayerCache`."""
        if self._first is None:
            self._mask = tokens.self_mask
            if self._cache is not None:
                keys, values, self._mask = self._cache.append(keys, values, tokens)
            self._first = keys, values, tokens
        return *self._first[:2], self._mask

    def select(self, index: Int[Tensor, "batch chosen"], tokens: Tokens) -> None:
        """Narrows the tokens that look to those at `index`."""
        if self._first is None:
            return
        if self._mask is None:
            self._mask = tokens.mask_over(self._first[2])
        else:
            mask = self._mask.expand(index.shape[0], -1, -1, -1)
            self._mask = mask.gather(2, index[:, None, :, None].expand(-1, -1, -1, mask.shape[3]))


def _count(tokens: Tokens, grid: Tensor) -> Tensor:
    """How many of a (batch, seq) grid of tokens are no padding."""
    if tokens.valid is None:
        return torch.full((), float(grid.shape[0] * grid.shape[1]), device=grid.device)
    return tokens.valid.sum().float()


def _row_starts(grid: Tensor) -> Int[Tensor, "batch 1"]:
    """Flat index at which each row of a (batch, seq) grid starts."""
    return torch.arange(grid.shape[0], device=grid.device).unsqueeze(1) * grid.shape[1]
