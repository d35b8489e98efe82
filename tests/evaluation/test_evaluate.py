import json
import math

import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.errors import CheckpointError, TokenizerError
from ultrathink_model.evaluation.baselines import BASELINES_NAME, cached_baselines
from ultrathink_model.evaluation.depths import depth_pieces
from ultrathink_model.evaluation.evaluate import evaluate, evaluate_model
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.evaluation.samples import held_out_prompts
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import build_model


@pytest.fixture
def tokenizer(manifest):
    return Tokenizer.load(manifest.tokenizer_folder)


def test_uniform_model_costs_the_tokens_times_the_logarithm_of_the_vocabulary(text_config, manifest, tokenizer):
    model = build_model(text_config)
    torch.nn.init.zeros_(model.embedding.weight)
    result = evaluate(model, tokenizer, manifest, text_config)
    split = manifest.splits["validation"]
    bits = split.tokens * math.log2(text_config.model.vocab_size) / split.bytes
    assert result.metrics["eval/validation/loss"] == pytest.approx(math.log(text_config.model.vocab_size), abs=1e-6)
    assert result.metrics["eval/validation/bits_per_byte"] == pytest.approx(bits, abs=1e-6)
    assert (result.validation_tokens, result.validation_bytes) == (split.tokens, split.bytes)


def test_evaluation_does_not_depend_on_the_batch_size(text_config, manifest, tokenizer):
    model = build_model(text_config)
    losses = [
        evaluate(model, tokenizer, manifest, override_config(text_config, [f"evaluation.batch_size={size}"])).metrics
        for size in (1, 5)
    ]
    # Sums of float32 losses in another order; rounding is about 1e-7 of each.
    assert losses[0]["eval/validation/loss"] == pytest.approx(losses[1]["eval/validation/loss"], rel=1e-6)


def test_calibration_is_taken_over_as_many_bins_as_asked(text_config, manifest, tokenizer):
    config = override_config(text_config, ["model.initializer_range=0.5", "evaluation.num_generations=0"])
    model = build_model(config)
    few, many = (
        evaluate(model, tokenizer, manifest, override_config(config, [f"evaluation.calibration_bins={bins}"]))
        for bins in (2, 40)
    )
    assert len(few.reliability) <= 2 < len(many.reliability) <= 40
    edges = [int(found.confidence * 40) for found in many.reliability]
    assert edges == sorted(set(edges)), "two bins share a fortieth"
    assert few.metrics["eval/validation/accuracy"] == many.metrics["eval/validation/accuracy"]
    # Errors of opposite signs within a wide bin cancel.
    error = "eval/validation/calibration_error"
    assert few.metrics[error] <= many.metrics[error] + 1e-9


def test_folder_is_evaluated_and_the_result_written(text_config, manifest, tmp_path):
    model = build_model(text_config)
    save_model(model, manifest.tokenizer_folder, tmp_path / "final_model")
    result = evaluate_model(tmp_path / "final_model", manifest, text_config, tmp_path / "run")
    assert EvaluationResult.load(tmp_path / "run/evaluation.json") == result
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["evaluation.json"]
    tasks = {name.split("/")[1] for name in result.metrics}
    assert tasks == {"validation", "unigram", "bigram", "context", "generation"}
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert len(result.samples) == text_config.evaluation.num_generations


def test_samples_are_the_same_for_the_same_seed(text_config, manifest, tokenizer):
    model = build_model(text_config)
    first, second, other = (
        evaluate(model, tokenizer, manifest, override_config(text_config, [f"training.seed={seed}"])).samples
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_no_samples_are_made_when_none_are_wanted(text_config, manifest, tokenizer):
    config = override_config(text_config, ["evaluation.num_generations=0"])
    assert evaluate(build_model(config), tokenizer, manifest, config).samples == []


def test_reading_says_how_deep_each_token_went(text_config, manifest, tokenizer):
    config = override_config(
        text_config, ["advanced.enable_dre=true", "dre.force_path=deep", "model.max_seq_length=32"]
    )
    reading = evaluate(build_model(config), tokenizer, manifest, config).reading
    prompt = held_out_prompts(manifest, tokenizer, 1, 32, config.training.seed)[0]
    assert "".join(piece.text for piece in reading) == tokenizer.decode(prompt)
    assert [piece.passes for piece in reading] == [2.0] * len(prompt)
    assert evaluate(build_model(text_config), tokenizer, manifest, text_config).reading == []


def test_reading_keeps_the_bytes_of_a_character_together(tokenizer):
    ids = tokenizer.encode("a‽b")
    assert len(ids) > 3, "the tokenizer knows no such character"
    pieces = depth_pieces(tokenizer, ids, [1.0] * (len(ids) - 1) + [3.0])
    assert [piece.text for piece in pieces] == ["a", "‽", "b"]
    assert pieces[2].passes == 3.0


def test_prompts_are_beginnings_of_held_out_sentences(manifest, tokenizer, tmp_path):
    held_out = " ".join(
        (tmp_path / f"text/{number:02d}.txt").read_text() for number in range(40) if number % 4 in (0, 3)
    )
    prompts = [tokenizer.decode(prompt) for prompt in held_out_prompts(manifest, tokenizer, 20, 12, seed=3)]
    assert all(prompt.strip() in held_out for prompt in prompts)
    # Most places have a sentence's end behind them; what stands before the end of a document has none.
    assert sum(prompt[:1].isupper() for prompt in prompts) > 10
    assert all(len(prompt) <= 12 for prompt in held_out_prompts(manifest, tokenizer, 20, 12, seed=3))


def test_baselines_are_counted_once_for_a_data_set(manifest):
    counted = cached_baselines(manifest)
    path = manifest.path / BASELINES_NAME
    kept = json.loads(path.read_text())
    kept["losses"]["unigram"]["loss"] = 1.25
    path.write_text(json.dumps(kept))
    assert cached_baselines(manifest)["unigram"].loss == 1.25
    kept["fingerprint"] = "another data set"
    path.write_text(json.dumps(kept))
    assert cached_baselines(manifest) == counted


def test_damaged_baselines_are_counted_anew(manifest):
    counted = cached_baselines(manifest)
    (manifest.path / BASELINES_NAME).write_text('{"losses": ')
    assert cached_baselines(manifest) == counted


def test_data_of_another_tokenizer_are_refused(text_config, manifest, tmp_path):
    save_model(build_model(text_config), manifest.tokenizer_folder, tmp_path / "final_model")
    other = prepare_data(override_config(text_config, ["model.vocab_size=280"]))
    with pytest.raises(TokenizerError, match=r"data\.tokenizer_name"):
        evaluate_model(tmp_path / "final_model", other, text_config)


def test_folder_without_a_model_is_refused(text_config, manifest, tmp_path):
    Tokenizer.load(manifest.tokenizer_folder).save(tmp_path / "empty")
    with pytest.raises(CheckpointError):
        evaluate_model(tmp_path / "empty", manifest, text_config)


def test_a_loss_that_is_not_finite_can_be_kept_and_read(tmp_path):
    result = EvaluationResult(
        metrics={"eval/validation/perplexity": math.inf}, data_fingerprint="", validation_tokens=1, validation_bytes=1
    )
    result.save(tmp_path / "evaluation.json")
    assert EvaluationResult.load(tmp_path / "evaluation.json") == result
    json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
