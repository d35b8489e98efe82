import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ultrathink_model.config import override_config
from ultrathink_model.data import prepare_data
from ultrathink_model.errors import CheckpointError, ConfigError
from ultrathink_model.models.generation import generate
from ultrathink_model.models.guard import Guard
from ultrathink_model.models.harm_head import HarmHead
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.models.transformer import build_model
from ultrathink_model.models.upcycle import initialise_from


@pytest.fixture
def config(tiny_config):
    return override_config(tiny_config, ["advanced.enable_constitutional=true"])


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(0))


def test_loss_is_the_mean_over_categories_summed_over_labelled_tokens():
    head = HarmHead(8, 3)
    head.weight.data.normal_()
    head.bias.data.normal_()
    hidden = torch.randn(4, 5, 8)
    labels = torch.tensor([[0, 1, 2, 4, 7], [3, 3, 0, 0, 5]])
    targets = torch.tensor([[[bits >> c & 1 for c in range(3)] for bits in row] for row in labels.tolist()])
    logits = hidden[2:] @ head.weight.T + head.bias
    expected = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum") / 3
    torch.testing.assert_close(head.loss_sum(hidden, labels), expected)


def test_gradient_of_the_harm_loss_is_the_finite_difference_and_reaches_the_trunk(config):
    model = build_model(config).double().train()
    x, labels = tokens(3, 8), torch.tensor([[5, 5, 5, 0, 0, 512, 512, 512]])
    ignored = torch.full_like(x, -100)

    def loss() -> torch.Tensor:
        return model(x, labels=ignored, harm_labels=labels).aux_losses["harm"]

    loss().backward()
    step = 1e-4
    for weight in (model.harm_head.weight, model.harm_head.bias, model.blocks[0].attention.qkv.weight):
        direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        slope = float((weight.grad * direction).sum())
        around = []
        with torch.no_grad():
            for move in (step, -2 * step, step):
                weight.add_(move * direction)
                around.append(float(loss()))
        above, below, _ = around
        # The head computes in float32: its losses of about 5 are exact to 1e-6, over 2e-4.
        assert slope == pytest.approx((above - below) / (2 * step), abs=2e-2, rel=1e-2)
        assert slope != 0


def test_head_takes_part_in_every_training_loss_and_changes_no_logit(config, tiny_config):
    model, plain = build_model(config).train(), build_model(tiny_config)
    x = tokens(2, 8)
    output = model(x, labels=x)
    assert output.aux_losses["harm"] == 0
    (output.loss_sum + output.aux_losses["harm"]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model.eval()(x).logits, plain.eval()(x).logits)


def test_weight_scales_the_loss(config):
    x, labels = tokens(2, 8), torch.ones(1, 8, dtype=torch.long)
    losses = [
        build_model(override_config(config, [f"constitutional.harm_loss_weight={weight}"]))
        .train()(x, labels=x, harm_labels=labels)
        .aux_losses["harm"]
        for weight in (1, 3)
    ]
    torch.testing.assert_close(losses[1], 3 * losses[0])


def test_export_brings_the_head_and_its_code(config, tmp_path):
    manifest = prepare_data(config)
    model = build_model(config).eval()
    folder = tmp_path / "model"
    save_model(model, manifest.tokenizer_folder, folder)
    assert torch.equal(load_model(folder).harm_head.weight, model.harm_head.weight)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["UltrathinkForCausalLM"]
    x = tokens(2, 7)
    torch.save(x, tmp_path / "x.pt")
    # A process without our package: only the folder's own code.
    program = f"""
import json, sys, torch
sys.modules["ultrathink_model"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
scores = model.harm_scores(torch.load({str(tmp_path / "x.pt")!r}, weights_only=True))
print("SCORES " + json.dumps({{name: score.tolist() for name, score in scores.items()}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    line = next(line for line in done.stdout.splitlines() if line.startswith("SCORES "))
    theirs = json.loads(line.removeprefix("SCORES "))
    ours = model.harm_head(model(x).hidden[:, -1]).sigmoid()
    assert tuple(theirs) == config.advanced.harm_categories
    torch.testing.assert_close(torch.tensor(list(theirs.values())).T, ours)


def test_head_is_grafted_on_and_never_lost_in_silence(config, tiny_config, tmp_path):
    manifest = prepare_data(config)
    save_model(build_model(tiny_config), manifest.tokenizer_folder, tmp_path / "plain")
    save_model(build_model(config), manifest.tokenizer_folder, tmp_path / "headed")
    report = initialise_from(build_model(config), tmp_path / "plain")
    assert sorted(report.new) == ["harm_head.bias", "harm_head.weight"]
    with pytest.raises(CheckpointError, match="harm head there"):
        initialise_from(build_model(tiny_config), tmp_path / "headed")


def loaded_head(config, logit: float):
    """A model whose head gives `self_harm` one logit everywhere, and the others next to nothing."""
    model = build_model(config).eval()
    with torch.no_grad():
        model.harm_head.weight.zero_()
        model.harm_head.bias.fill_(-20)
        model.harm_head.bias[3] = logit
    return model


def test_guard_stops_before_the_first_word_after_a_harmful_prompt(config):
    done = generate(loaded_head(config, 2.0), tokens(3, 4), max_new_tokens=5, pad_token_id=7, guard=Guard())
    assert not done.mask.any()
    assert (done.tokens == 7).all()
    assert done.guarded.all()


def test_guard_writes_its_own_words_and_ends(config):
    guard = Guard(redirect=(11, 12, 13))
    done = generate(loaded_head(config, 2.0), tokens(2, 4), max_new_tokens=6, pad_token_id=7, guard=guard)
    assert done.tokens.tolist() == [[11, 12, 13, 7, 7, 7]] * 2
    assert done.mask.sum(1).tolist() == [3, 3]
    assert not done.logprobs.any()


def test_guard_leaves_harmless_rows_as_they_are(config):
    model, prompts = build_model(config).eval(), tokens(4, 5)
    with torch.no_grad():
        model.harm_head.weight.normal_(generator=torch.Generator().manual_seed(2))
        first = model.harm_head(model(prompts).hidden[:, -1]).sigmoid().amax(1)
    threshold = float(first.sort().values[1:3].mean())  # two rows above, two below
    plain = generate(model, prompts, max_new_tokens=1, temperature=0)
    done = generate(model, prompts, max_new_tokens=1, temperature=0, guard=Guard(threshold=threshold, redirect=(9,)))
    assert torch.equal(done.guarded, first > threshold)
    assert done.guarded.sum() == 2
    assert torch.equal(done.tokens[~done.guarded], plain.tokens[~done.guarded])
    assert (done.tokens[done.guarded] == 9).all()
    assert generate(model, prompts, max_new_tokens=1).guarded is None


def test_category_can_be_let_pass(config):
    model = loaded_head(config, 2.0)
    done = generate(model, tokens(2, 4), max_new_tokens=3, guard=Guard(thresholds={"self_harm": 1.0}))
    assert done.mask.all()
    assert not done.guarded.any()


@pytest.mark.parametrize(
    ("guard", "message"),
    [(Guard(thresholds={"self-harm": 0.5}), "no harm category"), (Guard(threshold=1.5), "must be probabilities")],
)
def test_guard_that_cannot_be_is_refused(config, guard, message):
    with pytest.raises(ConfigError, match=message):
        generate(build_model(config), tokens(1, 3), max_new_tokens=1, guard=guard)


def test_guard_needs_a_head(tiny_config):
    with pytest.raises(ConfigError, match="no harm head"):
        generate(build_model(tiny_config), tokens(1, 3), max_new_tokens=1, guard=Guard())
