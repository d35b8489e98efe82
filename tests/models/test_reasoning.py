"""The reasoning engine: dense at step 0, cheaper after, and outside of training decided by the past alone."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.errors import ConfigError
from ultrathink_model.models.kv_cache import KVCache
from ultrathink_model.models.reasoning import ANNEALING_LEVELS, FILLED, PATHS, DepthRouter
from ultrathink_model.models.tokens import Rotation, Tokens
from ultrathink_model.models.transformer import Block, Transformer, build_model

ENGINE = ("advanced.enable_dre=true", "dre.layer_frequency=1")


def depth_routers(model: Transformer) -> list[DepthRouter]:
    return [block.depth_router for block in model.blocks if block.depth_router is not None]


@torch.no_grad()
def spread_out(model: Transformer, thresholds: tuple[float, ...] = (-0.2, 0.6, 1.2)) -> Transformer:
    """Gives routers and further passes weights that make a difference, as training would."""
    generator = torch.Generator().manual_seed(7)
    for router in depth_routers(model):
        router.router.weight.normal_(0.0, 0.2, generator=generator)
        router.strengths.copy_(torch.tensor([0.6, -0.8]))
        router.thresholds.copy_(torch.tensor(thresholds))
    return model


@pytest.fixture
def routed(small_model):
    """`routed("dre.deep_share=0", …)`: a model whose blocks are all routed, its routers far from their start."""
    return lambda *overrides: spread_out(small_model(*ENGINE, *overrides))


def run_step(model: Transformer, tokens: Tensor, step: int = 0) -> Tensor:
    """One training step without an optimizer; returns the loss."""
    model.train()
    model.begin_step(step)
    output = model(tokens[:, :-1], tokens[:, 1:])
    model.end_step(lambda counts: counts)
    assert output.loss_sum is not None
    return output.loss_sum


class FirstPass:
    """Keeps the keys of its first call for the reference below."""

    def __init__(self) -> None:
        self.first: tuple[Tensor, ...] | None = None

    def append(self, keys: Tensor, values: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        self.first = self.first or (keys, values, tokens.mask_over(tokens))
        return self.first


def reference(block: Block, x: Tensor, tokens: Tokens, table: Rotation, passes: Tensor) -> Tensor:
    """A routed block with nothing gathered: all tokens make all passes, and what they may not change is put back."""
    router = block.depth_router
    gate = (2 * router.logits(x).sigmoid()).unsqueeze(-1)
    among = Tokens(tokens.positions, tokens.document_ids, passes >= 1, sliding_window=tokens.sliding_window)
    keys = FirstPass()
    for depth in range(3):
        strength = router.strengths[depth - 1].tanh() if depth else 1.0
        change, _ = block.residual(x, among, table, keys)
        x = torch.where((passes > depth).unsqueeze(-1), x + strength * gate * change, x)
    return x


def passes_by_threshold(router: DepthRouter, x: Tensor) -> Tensor:
    return (router.logits(x).unsqueeze(-1) > router.thresholds).sum(dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "window 5", "window 20", "packed"])
def test_passes_equal_a_reference_that_gathers_nothing(routed, variant):
    """The wider window holds all the tokens that pass, but not all positions."""
    window = [f"model.sliding_window={variant.split()[1]}"] if "window" in variant else []
    model = routed(*window).eval()
    block = model.blocks[0]
    x = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(0))
    documents = torch.arange(24).div(9, rounding_mode="floor").expand(3, -1) if variant == "packed" else None
    tokens = Tokens(torch.arange(24).unsqueeze(0), documents, sliding_window=model.config.model.sliding_window)
    table = Rotation.table(24, 8, 10_000.0, x.device)
    passes = passes_by_threshold(block.depth_router, x)
    assert set(passes.flatten().tolist()) == {0, 1, 2, 3}
    expected = reference(block, x, tokens, table, passes)
    result, routing = block(x, tokens, table)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(result[passes == 0], x[passes == 0]), "a token on the fast path keeps its state"
    assert torch.equal(routing.passes[0].int(), passes.int())


@torch.no_grad()
def test_before_any_threshold_training_takes_the_highest_logits(routed):
    model = routed("dre.compute_budget=0.75", "dre.deep_share=0.2", "dre.ultra_deep_share=0.1")
    block = model.blocks[0]
    block.depth_router.thresholds.copy_(torch.tensor([-math.inf, math.inf, math.inf]))
    x = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0))
    tokens, table = Tokens(torch.arange(20).unsqueeze(0)), Rotation.table(20, 8, 10_000.0, x.device)
    place = block.depth_router.logits(x).argsort(dim=1, descending=True).argsort(dim=1)
    passes = (place < 9).int() + (place < 4) + (place < 2)  # shares 0.45, 0.2 and 0.1 of 20 tokens
    result, routing = block(x, tokens, table)
    torch.testing.assert_close(result, reference(block, x, tokens, table, passes), atol=1e-5, rtol=1e-5)
    assert [routing.counts[f"dre/passes/{depth}"] for depth in range(3)] == [27, 12, 6]
    assert torch.equal(routing.passes[0].int(), passes)


@torch.no_grad()
@pytest.mark.parametrize("mixture", [False, True])
def test_switching_it_on_changes_nothing_at_step_0(small_model, random_tokens, mixture):
    overrides = [f"advanced.enable_moe={str(mixture).lower()}"]
    dense = small_model(*overrides)
    model = small_model(*overrides, *ENGINE, "advanced.dre_warmup_steps=10")
    missing, _ = model.load_state_dict(dense.state_dict(), strict=False)
    assert all("depth_router" in name for name in missing)
    tokens = random_tokens(3, 33)
    assert torch.equal(run_step(model, tokens), dense(tokens[:, :-1], tokens[:, 1:]).loss_sum)
    assert torch.equal(model.eval()(tokens).logits, dense.eval()(tokens).logits)
    fresh = small_model(*overrides, *ENGINE)
    assert torch.equal(fresh.eval()(tokens).logits, dense(tokens).logits), "before any threshold is learned"


def test_router_and_strengths_learn_from_the_language_loss_at_step_0(small_model, random_tokens):
    model = small_model(*ENGINE, "advanced.dre_warmup_steps=10")
    run_step(model, random_tokens(3, 33)).backward()
    for router in depth_routers(model):
        assert router.router.weight.grad.abs().max() > 0
        assert router.strengths.grad.abs().min() > 0


@pytest.mark.parametrize("path", [None, *PATHS])
def test_every_parameter_has_a_gradient_on_every_path(small_model, random_tokens, path):
    """Data-parallel wrappers wait for all of them."""
    forced = [] if path is None else [f"dre.force_path={path}"]
    model = small_model(*ENGINE, "advanced.enable_moe=true", "dre.deep_share=0", "dre.ultra_deep_share=0", *forced)
    run_step(model, random_tokens(2, 17)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_compute_falls_in_few_levels_from_full_to_the_budget(small_model):
    model = small_model(*ENGINE, "advanced.dre_warmup_steps=100", "dre.compute_budget=0.6")
    router = depth_routers(model)[0]
    shares = []
    for step in range(120):
        model.begin_step(step)
        shares.append(router.shares[0])
        line = max(1 - 0.55 * step / 100, 0.45)
        assert line - 1e-9 <= shares[-1] <= line + 0.55 / ANNEALING_LEVELS + 1e-9
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[100:] == [pytest.approx(0.45)] * 20
    assert len(set(shares)) == ANNEALING_LEVELS + 1
    assert sum(router.shares) == pytest.approx(0.6), "with the further passes, the budget"


def test_first_blocks_stay_dense_where_asked(small_model, small_config):
    model = small_model(*ENGINE, "model.num_layers=3", "dre.dense_layers=1")
    assert [block.depth_router is not None for block in model.blocks] == [False, True, True]
    with pytest.raises(ConfigError, match=r"dre\.dense_layers=2 with model\.num_layers=2: no block would be routed"):
        small_config(*ENGINE, "dre.dense_layers=2")


def test_no_warmup_starts_at_the_budget(small_model, random_tokens):
    model = small_model(*ENGINE, "dre.compute_budget=0.7")
    run_step(model, random_tokens(2, 41))
    assert model.routing_statistics()["dre/compute"].item() == pytest.approx(0.7, abs=0.5 / 40)


def flops(model: Transformer, tokens: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        output = model(tokens[:, :-1], tokens[:, 1:])
        if model.training:
            output.loss_sum.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mixture", [False, True])
def test_training_and_evaluation_cost_what_the_budget_says(small_model, random_tokens, mixture):
    """Routed blocks without their attention scores scale with the mean passes; the scores fall faster than that.

    The bounds on the scores: those among the first pass's tokens cost share², a further pass's its share times
    the first's.
    """
    on = f"advanced.enable_moe={str(mixture).lower()}"
    tokens = random_tokens(4, 65)
    model, dense, empty = (
        small_model(on, *ENGINE, *overrides) for overrides in ([], ["dre.force_path=standard"], ["dre.force_path=fast"])
    )
    spread_out(model)
    first, further = 0.45, 0.15
    run_step(model, tokens)
    for training in (True, False):
        # A longest row fills up the others in evaluation, so one row shows what its own tokens cost.
        rows = tokens if training else tokens[:1]
        nothing, full, ours = (flops(each.train(training), rows) for each in (empty, dense, model))
        share = (ours - nothing) / (full - nothing)
        slack = 0.03 if training else 0.1  # `empty` trains a token a row; one threshold fits each row but roughly
        assert first + further**2 - slack < share < first + further + slack


def test_evaluation_takes_the_paths_of_training(routed, random_tokens):
    """Of 64 random tokens the number over a threshold differs by 4 from row to row, so that some rows lack room."""
    model = routed("dre.compute_budget=0.75", "dre.deep_share=0.2", "dre.ultra_deep_share=0.1")
    tokens = random_tokens(32, 65)
    for _ in range(3):
        run_step(model, tokens)
    with torch.no_grad():
        trained, evaluated = (torch.stack(model.train(mode)(tokens[:, :-1]).passes) for mode in (True, False))
    assert (trained == evaluated).float().mean() > 0.9
    assert 0.8 * 0.75 < model.routing_statistics()["dre/compute"] <= 0.75
    shares = model.routing_statistics()["dre/paths"]
    assert shares.shape == (2, 4)
    reached = trained[0].float()
    torch.testing.assert_close(
        shares[0], torch.stack([(reached == n).float().mean() for n in range(4)]), atol=0.02, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "window", "packed"])
def test_training_routes_as_evaluation_does_where_there_is_room(routed, variant):
    window = ["model.sliding_window=12"] if variant == "window" else []
    model = routed("dre.compute_budget=2.5", "dre.deep_share=0.8", "dre.ultra_deep_share=0.75", *window)
    x = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(0))
    documents = torch.arange(24).div(9, rounding_mode="floor").expand(3, -1) if variant == "packed" else None
    tokens = Tokens(torch.arange(24).unsqueeze(0), documents, sliding_window=model.config.model.sliding_window)
    table = Rotation.table(24, 8, 10_000.0, x.device)
    (trained, report), (evaluated, expected) = (model.blocks[0].train(mode)(x, tokens, table) for mode in (True, False))
    assert torch.equal(report.passes[0], expected.passes[0])
    assert report.counts["dre/passes/0"] == (expected.passes[0] > 0).sum() < 0.9 * 3 * 24
    torch.testing.assert_close(trained, evaluated, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_row_without_room_turns_the_lowest_logits_away(routed):
    block = routed("dre.compute_budget=0.5", "dre.deep_share=0", "dre.ultra_deep_share=0").blocks[0]
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    tokens, table = Tokens(torch.arange(20).unsqueeze(0)), Rotation.table(20, 8, 10_000.0, x.device)
    logits = block.depth_router.logits(x)[0]
    for wanted, taken in ((15, 10), (7, 7)):
        block.depth_router.thresholds[0] = logits.sort(descending=True).values[wanted - 1 : wanted + 1].mean()
        passes = block(x, tokens, table)[1].passes[0][0]
        assert set(passes.nonzero().flatten().tolist()) == set(logits.topk(taken).indices.tolist())


@pytest.mark.parametrize("step", [0, 100])
def test_thresholds_and_counts_do_not_depend_on_how_the_batch_is_cut(routed, random_tokens, step):
    tokens = random_tokens(6, 33)
    whole, cut = routed(), routed()
    for model, parts in ((whole, [tokens]), (cut, [tokens[:1], tokens[1:]])):
        before = [router.thresholds.clone() for router in depth_routers(model)]
        model.begin_step(step)
        for part in parts:
            model(part[:, :-1], part[:, 1:])
        model.end_step(lambda counts: counts)
    for one, other, unlike in zip(depth_routers(whole), depth_routers(cut), before, strict=True):
        torch.testing.assert_close(one.thresholds, other.thresholds)
        assert not torch.allclose(one.thresholds, unlike)
    torch.testing.assert_close(whole.routing_statistics(), cut.routing_statistics())


@torch.no_grad()
@pytest.mark.parametrize("begins_at", [-3.0, 3.0])
@pytest.mark.parametrize("outlier", [0.0, 1000.0])
def test_after_warm_up_as_many_tokens_pass_as_is_aimed_at_however_rows_differ(routed, begins_at, outlier):
    model = routed("dre.compute_budget=0.25", "dre.deep_share=0", "dre.ultra_deep_share=0")
    router = depth_routers(model)[0]
    logits = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 8).unsqueeze(1)
    logits[:, 0] += outlier
    router.thresholds[0] = begins_at
    for _ in range(40):
        router.begin_step(100)
        router.end_step(router._choose_share(0, 128, logits, Tokens(torch.arange(128).unsqueeze(0))).counts)
    share = (logits > router.thresholds[0]).float().mean()
    assert share == pytest.approx(FILLED * 0.25, abs=0.01)
    by_row = logits.topk(32, dim=1).values[:, 30].mean()
    assert (logits > by_row).float().mean() > share, "the mean of the rows' own thresholds lets more pass"


def test_thresholds_return_to_the_dense_model_with_a_full_share(small_model, random_tokens):
    model = spread_out(small_model(*ENGINE, "advanced.dre_warmup_steps=10", "dre.ultra_deep_share=0"))
    run_step(model, random_tokens(2, 33), step=0)
    first, deep, ultra_deep = depth_routers(model)[0].thresholds.tolist()
    assert first == -math.inf
    assert math.isfinite(deep)
    assert ultra_deep == math.inf
    run_step(model, random_tokens(2, 33), step=10)
    assert math.isfinite(depth_routers(model)[0].thresholds[0])


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("path", "passes"), list(zip(PATHS, range(4), strict=True)))
def test_forced_path_is_everybodys(small_model, random_tokens, training, path, passes):
    model = spread_out(small_model(*ENGINE, f"dre.force_path={path}")).train(training)
    x, tokens = model.embedding(random_tokens(2, 12)), Tokens(torch.arange(12).unsqueeze(0))
    table = Rotation.table(12, 8, 10_000.0, x.device)
    block = model.blocks[0]
    expected = reference(block, x, tokens, table, torch.full((2, 12), passes))
    torch.testing.assert_close(block(x, tokens, table)[0], expected, atol=1e-5, rtol=1e-5)
    run_step(model, random_tokens(2, 13))
    assert model.routing_statistics()["dre/paths"][0].tolist() == [float(number == passes) for number in range(4)]
    assert model.routing_statistics()["dre/compute"] == passes


def test_padding_is_chosen_last_and_not_counted(routed, random_tokens):
    model = routed("dre.compute_budget=0.65")
    for router in depth_routers(model):
        router.thresholds.fill_(-math.inf)
    tokens = random_tokens(2, 20)
    mask = torch.arange(20) >= torch.tensor([[0], [16]])
    model(tokens, attention_mask=mask)
    model.end_step(lambda counts: counts)
    paths = model.routing_statistics()["dre/paths"] * 24
    # Of the first row's 20 tokens 10 pass, 2 twice, 1 thrice; of the second's 4 all pass, 2 twice, 1 thrice.
    assert paths[0].round().tolist() == [10, 10, 2, 2]
    assert all(router.thresholds.isfinite().all() for router in depth_routers(model))


@torch.no_grad()
def test_left_padding_changes_no_logit_of_a_real_token(routed, random_tokens):
    model = routed().eval()
    tokens = random_tokens(1, 14)
    padded = torch.cat((random_tokens(1, 5, seed=9), tokens), dim=1)
    mask = torch.arange(19).unsqueeze(0) >= 5
    result = model(padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(result, model(tokens).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_calls_give_the_logits_of_one_call_and_keep_fewer_keys(routed, random_tokens):
    model = routed("advanced.enable_moe=true").eval()
    tokens = random_tokens(3, 30)
    cache = KVCache(model.config, 30)
    parts, start = [], 0
    for length in (11, 1, 1, 4, 1, 12):
        parts.append(model(tokens[:, start : start + length], cache=cache, start=start).logits)
        start += length
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, atol=1e-5, rtol=1e-5)
    first = passes_by_threshold(depth_routers(model)[0], model.embedding(tokens))
    assert cache[0].kept == (first > 0).sum()


def test_training_never_waits_for_the_device(routed, random_tokens):
    """Fake tensors hold no data, so whatever would read a value on the host fails."""
    model, tokens = routed("advanced.enable_moe=true"), random_tokens(2, 17)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = mode.from_tensor(tokens)
        output = model(tokens[:, :-1], tokens[:, 1:])
        (output.loss_sum + sum(output.aux_losses.values())).backward()


@torch.no_grad()
@pytest.mark.parametrize(
    ("key", "small", "large"),
    [
        ("dre.compute_budget", 0.5, 0.9),
        ("dre.deep_share", 0.05, 0.2),
        ("dre.ultra_deep_share", 0.01, 0.1),
        ("advanced.dre_warmup_steps", 0, 10),
        ("dre.layer_frequency", 1, 2),
        ("dre.dense_layers", 0, 1),
    ],
)
def test_every_key_changes_training(small_model, random_tokens, key, small, large):
    tokens = random_tokens(2, 33)
    losses = set()
    for value in (small, large):
        model = spread_out(small_model("advanced.enable_dre=true", "dre.layer_frequency=1", f"{key}={value}"))
        losses.add(run_step(model, tokens, step=4).item())
    assert len(losses) == 2


def easy_and_hard_runs(rows: int, generator: torch.Generator) -> Tensor:
    """Three runs of 12 tokens that each follow from the one before, then 8 that follow from the two before."""
    parts = []
    for _ in range(3):
        start = torch.randint(0, 32, (rows, 1), generator=generator)
        parts.append((start + torch.arange(12)) % 32)
        hard = list(torch.randint(0, 4, (2, rows), generator=generator))
        while len(hard) < 8:
            hard.append((hard[-1] + hard[-2]) % 4)
        parts.append(40 + torch.stack(hard, dim=1))
    return torch.cat(parts, dim=1)


def test_hard_tokens_get_more_passes(small_config):
    """With an output matrix of its own the model needs its block for the hard tokens alone."""
    steps, generator = 220, torch.Generator().manual_seed(0)
    alone = ("model.num_layers=1", "model.tie_embeddings=false", "model.initializer_range=0.1")
    model = build_model(small_config(*ENGINE, *alone, "advanced.dre_warmup_steps=110", "training.seed=0"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    for step in range(steps):
        optimizer.zero_grad()
        text = easy_and_hard_runs(16, generator)
        (run_step(model, text, step) / text[:, 1:].numel()).backward()
        optimizer.step()
        schedule.step()
    text = easy_and_hard_runs(32, generator)
    output = model.eval()(text[:, :-1])
    place = torch.arange(text.shape[1] - 1) % 20
    learned = (output.logits.argmax(dim=-1) == text[:, 1:])[:, (place >= 13) & (place < 19)]
    assert learned.float().mean() > 0.9
    is_hard = text[:, :-1] >= 40
    assert output.passes[0][is_hard].float().mean() > 4 * output.passes[0][~is_hard].float().mean()
