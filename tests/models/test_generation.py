"""Generation: the cache changes nothing, and what is drawn is what the model says."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ultrathink_model.models import kv_cache
from ultrathink_model.models.generation import choose_tokens, generate, generation_steps
from ultrathink_model.models.kv_cache import KVCache
from ultrathink_model.models.reasoning import DepthRouter
from ultrathink_model.models.transformer import Transformer

MOE = "advanced.enable_moe=true"
DRE = "advanced.enable_dre=true"
VARIANTS = {
    "dense": [],
    "window": ["model.sliding_window=7"],
    "plain kernels": ["model.use_flash_attention=false"],
    "mixture": [MOE],
    "routed": [DRE, "dre.layer_frequency=2"],
    "every block routed": [DRE, "dre.layer_frequency=1"],
    "routed mixture with a window": [DRE, MOE, "dre.layer_frequency=1", "model.sliding_window=7"],
    "all fast": [DRE, "dre.force_path=fast"],
    "all deep": [DRE, "dre.force_path=deep"],
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request, small_model) -> Transformer:
    return with_busy_routers(small_model("model.max_seq_length=256", *request.param))


@torch.no_grad()
def with_busy_routers(model: Transformer) -> Transformer:
    """The model with depth routers that send its tokens along all four paths."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, DepthRouter):
            module.router.weight.normal_(0.0, 0.3, generator=generator)
            module.strengths.fill_(0.5)
            module.thresholds.copy_(torch.tensor([-0.5, 0.5, 1.5]))
    return model


def left_padding(prompts: Tensor, *lengths: int) -> Tensor:
    return torch.arange(prompts.shape[1]) >= prompts.shape[1] - torch.tensor(lengths).unsqueeze(1)


# Cached and uncached passes sum the same float32 products in another order.
ROUNDING = {"atol": 1e-4, "rtol": 1e-4}


def test_cache_gives_the_tokens_of_a_full_pass(model, random_tokens, monkeypatch):
    monkeypatch.setattr(kv_cache, "RAGGED_ROOM", 10)  # so that ragged caches grow several times
    prompts = random_tokens(4, 9)
    mask = left_padding(prompts, 9, 4, 1, 8)
    options = {"attention_mask": mask, "max_new_tokens": 40, "temperature": 0.0}
    cached = generate(model, prompts, **options)
    full = generate(model, prompts, **options, use_cache=False)
    assert torch.equal(cached.tokens, full.tokens)
    torch.testing.assert_close(cached.logprobs, full.logprobs, **ROUNDING)


def test_padding_and_the_other_rows_change_nothing(model, random_tokens):
    prompts = random_tokens(3, 9)
    batch = generate(model, prompts, attention_mask=left_padding(prompts, 9, 4, 1), max_new_tokens=12, temperature=0.0)
    for row, length in enumerate((9, 4, 1)):
        alone = generate(model, prompts[row : row + 1, 9 - length :], max_new_tokens=12, temperature=0.0)
        assert torch.equal(batch.tokens[row], alone.tokens[0])


def test_prompt_may_come_in_parts(model, random_tokens):
    text = random_tokens(2, 20)
    cache = KVCache(model.config, capacity=1)  # grows, too
    parts = []
    model.eval()
    with torch.no_grad():
        for part in text.split([7, 1, 12], dim=1):
            parts.append(model(part, cache=cache, start=cache.length).logits)
            cache.length += part.shape[1]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(text).logits, **ROUNDING)


def test_cache_follows_its_rows(model, random_tokens):
    text, rows = random_tokens(3, 11), torch.tensor([2, 0, 0, 1])
    mask = left_padding(text[:, :10], 10, 6, 9)
    cache = KVCache(model.config, capacity=16)
    model.eval()
    with torch.no_grad():
        model(text[:, :10], attention_mask=mask, cache=cache)
        cache.select(rows)
        logits = model(text[rows, 10:], cache=cache, start=10).logits
        full_mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.bool)), dim=1)
        full = model(text, attention_mask=full_mask).logits[rows, 10:]
    torch.testing.assert_close(logits, full, **ROUNDING)


def test_logprobs_are_those_of_the_temperature_scaled_model(model, random_tokens):
    prompts = random_tokens(3, 6)
    generator = torch.Generator().manual_seed(0)
    result = generate(model, prompts, max_new_tokens=8, temperature=0.7, top_p=0.8, generator=generator)
    with torch.no_grad():
        logits = model.eval()(torch.cat((prompts, result.tokens), dim=1)).logits[:, 5:-1]
    expected = F.log_softmax(logits / 0.7, dim=-1).gather(2, result.tokens.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(result.logprobs, expected, **ROUNDING)


def test_skipped_tokens_leave_nothing_in_the_cache(small_model, random_tokens):
    text = random_tokens(8, 40)
    kept = {}
    for name in ("dense", "routed", "all fast"):
        model = with_busy_routers(small_model(*VARIANTS[name])).eval()
        cache = KVCache(model.config, capacity=40)
        with torch.no_grad():
            model(text, cache=cache)
        kept[name] = cache.kept
    assert kept["dense"] == [320, 320]
    assert kept["routed"][0] == 320
    assert 32 < kept["routed"][1] < 288
    assert kept["all fast"] == [320, 0]


def test_row_ends_with_its_stop_token(small_model, random_tokens):
    model, prompts = small_model(), random_tokens(6, 5)
    free = generate(model, prompts, max_new_tokens=20, temperature=0.0)
    stops = (int(free.tokens[0, 3]), int(free.tokens[1, 7]))
    result = generate(model, prompts, max_new_tokens=20, temperature=0.0, stop_token_ids=stops, pad_token_id=95)
    for row in range(6):
        ends = torch.isin(free.tokens[row], torch.tensor(stops)).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 20
        assert torch.equal(result.tokens[row, :length], free.tokens[row, :length])
        assert (result.tokens[row, length:] == 95).all()
        assert result.mask[row].tolist() == [True] * length + [False] * (20 - length)
        assert (result.logprobs[row, length:] == 0).all()
    assert result.mask[0].sum() <= 4


def test_generation_ends_when_all_rows_have(small_model, random_tokens):
    model, prompts = small_model(), random_tokens(2, 5)
    steps = list(
        generation_steps(
            model, prompts, max_new_tokens=50, temperature=0.0, stop_token_ids=range(model.config.model.vocab_size)
        )
    )
    assert len(steps) == 1
    assert generate(model, prompts, max_new_tokens=0).tokens.shape == (2, 0)


def test_same_generator_gives_the_same_text(small_model, random_tokens):
    model, prompts = small_model(), random_tokens(4, 5)

    def draw(seed: int) -> Tensor:
        return generate(model, prompts, max_new_tokens=16, generator=torch.Generator().manual_seed(seed)).tokens

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_generation_leaves_the_model_as_it_was(small_model, random_tokens):
    model = small_model(DRE, MOE).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(random_tokens(1, 5)).logits
    result = generate(model, random_tokens(2, 5), max_new_tokens=3)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not result.logprobs.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # The table of rotations that generation made is fit for training.
    model(random_tokens(2, 5), labels=random_tokens(2, 5)).loss_sum.backward()
    logits.sum().backward()


def test_compiled_blocks_are_not_compiled_for_generation(small_model, random_tokens):
    model, prompts = small_model(), random_tokens(2, 5)
    expected = generate(model, prompts, max_new_tokens=4, temperature=0.0)

    def refuse(*_: object) -> None:
        pytest.fail("a block was compiled")

    for block in model.blocks:
        block.compile(backend=refuse)
    assert torch.equal(generate(model, prompts, max_new_tokens=4, temperature=0.0).tokens, expected.tokens)


def test_draws_have_the_frequencies_of_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    logits = probabilities.log().expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn, logprobs = choose_tokens(logits, 1.0, 1.0, generator)
    # Four standard deviations of a share over 40,000 draws are at most 0.01.
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 40_000, probabilities, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs.exp(), probabilities[drawn])


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(4_000, 4)
    generator = torch.Generator().manual_seed(0)

    def kept(top_p: float) -> set[int]:
        return set(choose_tokens(logits, 1.0, top_p, generator)[0].tolist())

    assert kept(0.4) == {1}
    assert kept(0.7) == {1, 3}
    assert kept(0.76) == {1, 2, 3}
    assert kept(1.0) == {0, 1, 2, 3}


def test_low_temperature_is_greedy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50, generator=generator)
    # No two of the greatest logits are within 1e-4 of each other, a hundred times the temperature.
    assert torch.equal(choose_tokens(logits, 1e-6, 1.0, generator)[0], choose_tokens(logits, 0.0, 1.0)[0])
