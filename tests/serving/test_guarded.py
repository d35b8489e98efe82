"""`transformers`' generation under the guard, beside our own."""

import pytest
import torch

from ultrathink_model.errors import CheckpointError, ConfigError
from ultrathink_model.models.generation import generate
from ultrathink_model.models.guard import Guard
from ultrathink_model.models.hf import load_model
from ultrathink_model.serving import serve
from ultrathink_model.serving.guarded import guarded_by

END, WORDS = 1, [7, 8, 9]


def scores_of(model, tokens):
    """The highest probability of harm after each token."""
    return model.harm_head(model(tokens, return_logits=False).hidden).sigmoid().amax(-1)


@torch.no_grad()
def test_transformers_generation_and_ours_stop_at_the_same_word(finished_run):
    folder = finished_run("run", "advanced.enable_constitutional=true") / "final_model"
    model = load_model(folder).eval()
    prompts = torch.randint(10, 300, (4, 5), generator=torch.Generator().manual_seed(0))
    plain = generate(model, prompts, max_new_tokens=8, temperature=0.0)
    seen = scores_of(model, torch.cat((prompts, plain.tokens), dim=1))[:, 4:]
    # From a guard that stops all at once to one that never comes.
    thresholds = [0.0, float(seen[:, 4:].max(1).values.median()), 1.0]
    taken = []
    for threshold in thresholds:
        guard = Guard(threshold=threshold, redirect=WORDS)
        guarded = guarded_by(guard, END).from_pretrained(folder).eval()
        own = generate(
            model, prompts, max_new_tokens=8, temperature=0.0, stop_token_ids=[END], pad_token_id=0, guard=guard
        )
        for row, prompt in enumerate(prompts):
            found = guarded.generate(
                prompt[None],
                attention_mask=torch.ones(1, 5, dtype=torch.long),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=END,
                pad_token_id=0,
            )
            answer = [token for token in found[0, 5:].tolist() if token != END]
            assert answer == own.tokens[row][own.mask[row]].tolist()
        taken.append(int(own.guarded.sum()))
    assert taken[0] == 4
    assert 0 < taken[1] < 4
    assert taken[2] == 0


def test_guard_that_cannot_be_is_refused(finished_run, tmp_path):
    folder = finished_run("run", "advanced.enable_constitutional=true")
    with pytest.raises(ConfigError, match="--guard 2"):
        serve.main([str(folder), "--guard", "2"])
    # Without the tokenizer's settings no token is known to end a text.
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((folder / "final_model" / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="--no-guard"):
        serve._guarded(tmp_path / "bare", 0.5)
