"""The mixture of experts: its mathematics against `transformers`, its losses and counts against their formulas."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ultrathink_model.models.moe import MixtureOfExperts
from ultrathink_model.models.routing import Routing
from ultrathink_model.models.tokens import Tokens
from ultrathink_model.models.transformer import Transformer, build_model

GROUP_SIZES = (3, 2, 2, 1)
EXPERTS = sum(GROUP_SIZES)
HIDDEN = 32


@pytest.fixture
def mixture(small_config):
    """`mixture("moe.moe_top_k=1", …)`: a layer in training mode, its weights drawn wide."""

    def build(*overrides: str) -> MixtureOfExperts:
        layer = MixtureOfExperts(small_config("advanced.enable_moe=true", *overrides))
        generator = torch.Generator().manual_seed(0)
        layer.initialise(generator, 0.3, 0.3)
        with torch.no_grad():
            layer.router.weight.normal_(0.0, 0.3, generator=generator)
        return layer

    return build


def states(batch: int, seq: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(seed))


def grid(batch: int, seq: int, valid: Tensor | None = None, source_groups: Tensor | None = None) -> Tokens:
    return Tokens(torch.arange(seq).expand(batch, -1), valid=valid, source_groups=source_groups)


def router_probabilities(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    return F.linear(x, layer.router.weight).softmax(dim=-1).flatten(0, 1)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_outputs_and_gradients_equal_transformers(mixture, implementation, top_k):
    layer = mixture(f"moe.moe_top_k={top_k}", "moe.expert_hidden_size=24")
    settings = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=24,
        num_experts=EXPERTS,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    theirs = Qwen3MoeSparseMoeBlock(settings)
    theirs.load_state_dict(
        {"gate.weight": layer.router.weight, "experts.gate_up_proj": layer.gate_up, "experts.down_proj": layer.down}
    )
    x, their_x = states(2, 19).requires_grad_(), states(2, 19).requires_grad_()
    direction = states(2, 19, seed=1)
    result, expected = layer(x, grid(2, 19))[0], theirs(their_x)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    result.backward(direction)
    expected.backward(direction)
    pairs = {
        "x": (x, their_x),
        "router": (layer.router.weight, theirs.gate.weight),
        "gate_up": (layer.gate_up, theirs.experts.gate_up_proj),
        "down": (layer.down, theirs.experts.down_proj),
    }
    for name, (ours, other) in pairs.items():
        # Gradients of weights are sums over tokens of the order of 10: the bound is relative to them.
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_load_balance_loss_is_the_share_last_step_times_the_probability_now(mixture):
    layer = mixture("moe.load_balance_weight=0.5", "moe.router_z_loss_weight=0", "moe.group_loss_weight=0")
    x = states(2, 9)
    uniform = layer(x, grid(2, 9))[1].losses
    assert uniform.keys() == {"moe/load_balance"}
    assert uniform["moe/load_balance"].item() == pytest.approx(0.5 * 18)
    layer.end_step({"moe/load": torch.tensor([4.0, 0, 0, 0, 0, 0, 0, 12])})
    probabilities = router_probabilities(layer, x).sum(dim=0)
    expected = 0.5 * EXPERTS * (0.25 * probabilities[0] + 0.75 * probabilities[7])
    torch.testing.assert_close(layer(x, grid(2, 9))[1].losses["moe/load_balance"], expected)


def test_z_loss_is_the_squared_log_partition(mixture):
    layer = mixture("moe.router_z_loss_weight=0.25", "moe.load_balance_weight=0")
    x = states(2, 9)
    expected = 0.25 * F.linear(x, layer.router.weight).logsumexp(dim=-1).square().sum()
    losses = layer(x, grid(2, 9))[1].losses
    assert losses.keys() == {"moe/router_z"}
    torch.testing.assert_close(losses["moe/router_z"], expected)


def test_group_loss_is_minus_log_of_the_mass_of_the_sources_group(mixture):
    layer = mixture("moe.group_loss_weight=0.5")
    x = states(1, 6)
    groups = torch.tensor([[0, 3, -1, 1, -1, 3]])
    probabilities = router_probabilities(layer, x)
    starts = (0, 3, 5, 7, 8)
    expected = -sum(
        probabilities[token, starts[group] : starts[group + 1]].sum().log()
        for token, group in enumerate(groups[0].tolist())
        if group >= 0
    )
    loss = layer(x, grid(1, 6, source_groups=groups))[1].losses["moe/group"]
    torch.testing.assert_close(loss, 0.5 * expected)
    untagged = layer(x, grid(1, 6, source_groups=torch.full((1, 6), -1)))[1].losses["moe/group"]
    assert untagged == 0


def test_group_loss_moves_mass_to_the_group(mixture):
    layer = mixture("moe.group_loss_weight=1.0")
    x, tokens = states(2, 16), grid(2, 16, source_groups=torch.full((2, 16), 2))
    before = router_probabilities(layer, x)[:, 5:7].sum(dim=1).mean()
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        layer(x, tokens)[1].losses["moe/group"].backward()
        optimizer.step()
    assert router_probabilities(layer, x)[:, 5:7].sum(dim=1).mean() > 1.5 * before


def test_counts_equal_their_definition(mixture):
    layer = mixture()
    x = states(2, 11)
    groups = torch.tensor([[0] * 5 + [2] * 6, [-1] * 11])
    counts = layer(x, grid(2, 11, source_groups=groups))[1].counts
    probabilities = router_probabilities(layer, x)
    chosen = probabilities.topk(2).indices
    group_of = torch.repeat_interleave(torch.arange(4), torch.tensor(GROUP_SIZES))[chosen].view(2, 11, 2)
    assert counts["moe/load"].tolist() == chosen.flatten().bincount(minlength=EXPERTS).tolist()
    assert counts["moe/tokens"] == 22
    assert counts["moe/dropped"] == 0
    entropy = -(probabilities * probabilities.log()).sum() / math.log(EXPERTS)
    torch.testing.assert_close(counts["moe/entropy"], entropy)
    assert counts["moe/group_share"][0].tolist() == group_of[0, :5].flatten().bincount(minlength=4).tolist()
    assert counts["moe/group_share"][2].tolist() == group_of[0, 5:].flatten().bincount(minlength=4).tolist()
    assert counts["moe/group_share"][[1, 3]].sum() == 0


def test_padding_counts_for_nothing_and_changes_nothing(mixture):
    layer = mixture()
    x, groups = states(2, 12), torch.randint(0, 4, (2, 12), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(12) >= torch.tensor([[0], [5]])
    x.requires_grad_()
    padded, routing = layer(x, grid(2, 12, valid, groups))
    (padded.square().sum() + sum(routing.losses.values())).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    real = x.detach()[valid].unsqueeze(0)
    alone, expected = layer(real, grid(1, 19, source_groups=groups[valid].unsqueeze(0)))
    (alone.square().sum() + sum(expected.losses.values())).backward()
    torch.testing.assert_close(padded[valid], alone[0], atol=1e-5, rtol=1e-5)
    assert (padded[~valid] == 0).all()
    assert x.grad[~valid].abs().max() == 0
    for report in ("losses", "counts"):
        torch.testing.assert_close(getattr(routing, report), getattr(expected, report), atol=1e-4, rtol=1e-5)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_losses_and_counts_add_over_parts_of_the_batch(mixture):
    layer = mixture()
    layer.end_step({"moe/load": torch.arange(8.0)})
    x, groups = states(4, 8), torch.randint(-1, 4, (4, 8), generator=torch.Generator().manual_seed(1))
    _, whole = layer(x, grid(4, 8, source_groups=groups))
    parts = Routing()
    for rows in (slice(0, 1), slice(1, 4)):
        parts = parts.merge(layer(x[rows], grid(len(x[rows]), 8, source_groups=groups[rows]))[1])
    torch.testing.assert_close(parts.losses, whole.losses)
    torch.testing.assert_close(parts.counts, whole.counts)


def test_capacity_drops_the_latest_copies_of_a_full_expert(mixture):
    layer, free = mixture("moe.expert_capacity=1.0"), mixture()
    x = states(2, 12)
    full, routing = layer(x, grid(2, 12))
    chosen = router_probabilities(layer, x).topk(2)
    most = math.ceil(24 * 2 / EXPERTS)
    taken = [0] * EXPERTS
    expected = torch.zeros(24, HIDDEN)
    dropped = 0
    for token, (weights, experts) in enumerate(zip(*chosen, strict=True)):
        for weight, expert in zip((weights / weights.sum()).tolist(), experts.tolist(), strict=True):
            taken[expert] += 1
            if taken[expert] > most:
                dropped += 1
                continue
            gate, up = F.linear(x.flatten(0, 1)[token], layer.gate_up[expert]).chunk(2)
            expected[token] += weight * F.linear(F.silu(gate) * up, layer.down[expert])
    assert dropped > 0
    assert routing.counts["moe/dropped"] == dropped
    assert routing.counts["moe/load"].tolist() == [float(number) for number in taken]
    torch.testing.assert_close(full.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    full.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    layer.eval()
    torch.testing.assert_close(layer(x, grid(2, 12))[0], free(x, grid(2, 12))[0], msg="evaluation drops nothing")


def test_jitter_scales_the_routers_input_in_training_only(mixture):
    layer, plain = mixture("moe.router_jitter=0.3"), mixture()
    x, tokens = states(2, 12), grid(2, 12)
    torch.manual_seed(0)
    first = layer(x, tokens)[0]
    torch.manual_seed(0)
    assert torch.equal(layer(x, tokens)[0], first)
    assert not torch.allclose(layer(x, tokens)[0], first)
    assert torch.equal(layer.eval()(x, tokens)[0], plain.eval()(x, tokens)[0])


def test_evaluation_reports_nothing(mixture):
    assert mixture().eval()(states(1, 4), grid(1, 4))[1] == Routing()


def test_autocast_stays_near_float32_and_routes_alike(mixture):
    layer, x, tokens = mixture(), states(4, 32), grid(4, 32)
    expected, report = layer(x, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        result, rounded = layer(x, tokens)
    assert result.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: each of three roundings is off by at most 0.4 % of values of the order of 10.
    torch.testing.assert_close(result.float(), expected, atol=0.15, rtol=0.02)
    assert torch.equal(rounded.counts["moe/load"], report.counts["moe/load"]), "the router is not rounded"


def test_training_never_waits_for_the_device(small_model, random_tokens):
    """Fake tensors hold no data, so whatever would read a value on the host fails."""
    model = small_model("advanced.enable_moe=true", "moe.expert_capacity=1.0", "moe.router_jitter=0.1")
    tokens = random_tokens(2, 17)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = mode.from_tensor(tokens)
        output = model(tokens[:, :-1], tokens[:, 1:], source_groups=tokens[:, 1:] % 4)
        (output.loss_sum + sum(output.aux_losses.values())).backward()


def test_finished_step_sets_the_load_and_an_empty_one_leaves_it(mixture):
    layer = mixture()
    assert torch.equal(layer.expert_load, torch.full((EXPERTS,), 1 / EXPERTS))
    layer.end_step({"moe/load": torch.arange(8.0)})
    load = torch.arange(8.0) / 28
    torch.testing.assert_close(layer.expert_load, load)
    layer.end_step({"moe/load": torch.zeros(8)})
    layer.end_step({})
    torch.testing.assert_close(layer.expert_load, load)
    assert "expert_load" in layer.state_dict()


def test_bias_moves_by_its_rate_against_the_load_and_chooses_without_weighing(mixture):
    layer, plain = mixture("moe.router_bias_rate=0.5"), mixture()
    assert plain.router_bias is None
    x = states(2, 9)
    torch.testing.assert_close(layer(x, grid(2, 9))[0], plain(x, grid(2, 9))[0], msg="it starts at zero")
    layer.end_step({"moe/load": torch.tensor([9.0, 0, 0, 1, 1, 1, 1, 1])})  # a fair share is 1.75
    assert layer.router_bias.tolist() == [-0.5, *[0.5] * 7]
    layer.router_bias.copy_(torch.tensor([100.0, 100, 0, 0, 0, 0, 0, 0]))
    for training in (True, False):
        result, routing = layer.train(training)(x, grid(2, 9))
        weights = router_probabilities(layer, x)[:, :2]
        weights = weights / weights.sum(dim=1, keepdim=True)
        rows, expected = x.flatten(0, 1), torch.zeros(18, HIDDEN)
        for expert in range(2):
            gate, up = F.linear(rows, layer.gate_up[expert]).chunk(2, dim=1)
            expected += weights[:, expert, None] * F.linear(F.silu(gate) * up, layer.down[expert])
        torch.testing.assert_close(result.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
        if training:
            assert routing.counts["moe/load"].tolist() == [18.0, 18, 0, 0, 0, 0, 0, 0]


def test_statistics_are_shares_over_layers(mixture):
    layer = mixture("moe.expert_capacity=0.5")
    x, groups = states(4, 16), torch.randint(0, 3, (4, 16), generator=torch.Generator().manual_seed(1))
    layers = [layer(x * scale, grid(4, 16, source_groups=groups))[1].counts for scale in (1, 2)]
    statistics = MixtureOfExperts.statistics([{}, *layers, {"dre/tokens": torch.ones(())}])
    assert statistics["moe/load"].shape == (2, EXPERTS)
    torch.testing.assert_close(statistics["moe/load"].sum(dim=1), torch.ones(2))
    assert 0 < statistics["moe/entropy"] < 1
    assert 0 < statistics["moe/dropped"] < 0.7
    shares = statistics["moe/group_share"]
    torch.testing.assert_close(shares[:3].sum(dim=1), torch.ones(3))
    assert shares[3].isnan().all(), "no source of the fourth group"
    assert MixtureOfExperts.statistics([{}]) == {}


def test_sizes_follow_the_config(mixture):
    layer = mixture("moe.num_safety_experts=0", "moe.num_meta_experts=5", "moe.moe_top_k=3")
    assert layer.gate_up.shape == (10, 2 * 16, HIDDEN)  # a dense feed-forward of 48 units over three experts
    assert layer.down.shape == (10, HIDDEN, 16)
    assert mixture("moe.expert_hidden_size=20").down.shape == (EXPERTS, HIDDEN, 20)


def routing_after_training(model: Transformer, steps: int, num_sources: int = 1, last: int = 10) -> dict[str, Tensor]:
    """Trains on walks over a graph with a few frequent tokens, one graph a source; source i is tagged with group i.

    Returns:
        The routing statistics, as means over the last steps.
    """
    generator = torch.Generator().manual_seed(0)
    successors = (96 * torch.rand(num_sources, 96, 4, generator=generator) ** 3).long()
    sources = torch.arange(8) % num_sources
    tags = sources.unsqueeze(1).expand(-1, 32) if num_sources > 1 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        tokens = [torch.randint(0, 96, (8,), generator=generator)]
        for _ in range(32):
            branch = (4 * torch.rand(8, generator=generator) ** 2).long()
            tokens.append(successors[sources, tokens[-1], branch])
        text = torch.stack(tokens, dim=1)
        output = model(text[:, :-1], text[:, 1:], source_groups=tags)
        optimizer.zero_grad()
        ((output.loss_sum + sum(output.aux_losses.values())) / 256).backward()
        optimizer.step()
        model.end_step(lambda counts: counts)
        found.append(model.routing_statistics())
    return {name: torch.stack([step[name] for step in found[-last:]]).mean(dim=0) for name in found[0]}


def test_tagged_sources_go_to_their_own_group(small_config):
    model = build_model(small_config("advanced.enable_moe=true"))
    shares = routing_after_training(model, 200, num_sources=2)["moe/group_share"]
    for group in range(2):
        assert shares[group, group] > 1.5 * GROUP_SIZES[group] / EXPERTS


FAIR = 1 / EXPERTS


def test_default_balance_loss_keeps_every_expert_at_work(small_config):
    """Over 100 steps, that is: of a step's 256 tokens an expert may take next to none and be back in the next."""
    balanced = routing_after_training(build_model(small_config("advanced.enable_moe=true")), 200, last=100)["moe/load"]
    assert balanced.min() > FAIR / 4
    assert balanced.max() < 4 * FAIR
    free = build_model(small_config("advanced.enable_moe=true", "moe.load_balance_weight=0"))
    assert routing_after_training(free, 120, last=60)["moe/load"].min() < FAIR / 20, "some are dead without it"


def test_bias_keeps_every_expert_at_work(small_config):
    """Over 60 steps: what a step's few tokens choose swings about the fair share, and roundings decide how."""
    model = build_model(small_config("advanced.enable_moe=true", "moe.router_bias_rate=0.02"))
    load = routing_after_training(model, 120, last=60)["moe/load"]
    assert load.min() > FAIR / 4
    assert load.max() < 2 * FAIR
