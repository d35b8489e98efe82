import json
from pathlib import Path

import pytest
import torch
from alignment_cases import ALONE
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from ultrathink_model.alignment.align import align
from ultrathink_model.alignment.pairs import make_pairs
from ultrathink_model.alignment.reward import save_reward_model
from ultrathink_model.alignment.reward_training import RewardTrainer
from ultrathink_model.alignment.rewards import make_rewards
from ultrathink_model.alignment.sequences import make_sequences
from ultrathink_model.config import override_config
from ultrathink_model.data import Tokenizer
from ultrathink_model.errors import CheckpointError, ConfigError, DataError, RewardError
from ultrathink_model.models.hf import load_model
from ultrathink_model.tracking.metrics import read_metrics


def count_letters(prompts: list[str], responses: list[str]) -> list[float]:
    assert len(prompts) == len(responses)
    return [float(len(response)) for response in responses]


def vowels(_prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in response) / max(1, len(response)) for response in responses]


def sometimes_nan(_prompts: list[str], responses: list[str]) -> list[float]:
    return [float("nan") if number == 1 else 2.0 * number for number in range(len(responses))]


def raises(*_):
    raise RuntimeError("the service is gone")


def too_few(*_):
    return [1.0]


@pytest.fixture
def tokenizer(manifest) -> Tokenizer:
    return Tokenizer.load(manifest.tokenizer_folder)


@pytest.fixture
def sequences(tokenizer):
    responses = [tokenizer.encode(text) for text in ("abc", "a longer one", "xy", "vowels: aeiou")]
    return make_sequences([tokenizer.encode("ask")] * 4, responses, tokenizer.pad_id, "cpu")


@pytest.fixture
def rewards(base_config, tokenizer):
    def make(*sources, **keys):
        overrides = [f"rlhf.rewards={json.dumps(sources)}", *(f"rlhf.{key}={value}" for key, value in keys.items())]
        return make_rewards(override_config(base_config, overrides).rlhf, None, tokenizer, ALONE.device)

    return make


def function(name: str, weight: float = 1.0):
    return {"name": name, "kind": "callable", "source": f"test_rewards:{name}", "weight": weight}


def test_rewards_are_added_by_weight_and_reported_each(rewards, sequences, tokenizer):
    made = rewards(function("count_letters", 0.5), function("vowels", -2.0))
    texts = [
        tokenizer.decode(row[kept].tolist())
        for row, kept in zip(sequences.responses, sequences.response_mask, strict=True)
    ]
    letters, shares = torch.tensor(count_letters(texts, texts)), torch.tensor(vowels(texts, texts))
    torch.testing.assert_close(made.score(sequences), 0.5 * letters - 2.0 * shares)
    made.score(sequences)
    parts = made.pop_parts()
    assert parts == {
        "rlhf/reward/count_letters": pytest.approx(float(letters.mean())),
        "rlhf/reward/vowels": pytest.approx(float(shares.mean())),
        "rlhf/bad_rewards": 0,
    }
    assert made.pop_parts() == {}


def test_bad_number_ends_the_run_or_takes_the_mean_and_is_counted(rewards, sequences):
    with pytest.raises(RewardError, match="sometimes_nan gave nan for 1 of 4 responses, such as the tokens"):
        rewards(function("sometimes_nan")).score(sequences)
    made = rewards(function("sometimes_nan"), on_bad_reward="skip")
    assert made.score(sequences).tolist() == pytest.approx([0, 10 / 3, 4, 6])
    assert made.pop_parts()["rlhf/bad_rewards"] == 1


def test_raising_function_ends_the_run_or_is_counted(rewards, sequences):
    with pytest.raises(RewardError, match="test_rewards:raises raised RuntimeError: the service is gone"):
        rewards(function("raises")).score(sequences)
    made = rewards(function("raises"), function("count_letters"), on_bad_reward="skip")
    assert made.score(sequences).tolist() == rewards(function("count_letters")).score(sequences).tolist()
    assert made.pop_parts()["rlhf/bad_rewards"] == 4


def test_wrong_number_of_numbers_is_an_error(rewards, sequences):
    with pytest.raises(RewardError, match="returned 1 numbers for 4 responses"):
        rewards(function("too_few")).score(sequences)


@pytest.mark.parametrize(
    "source", ["no_such_module:f", "test_rewards:no_such", "test_rewards", "test_rewards:__name__"]
)
def test_function_that_is_not_there_is_refused(rewards, source):
    with pytest.raises(ConfigError, match=r"rlhf\.rewards: x: "):
        rewards({"name": "x", "kind": "callable", "source": source})


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "names nothing"),
        ([function("vowels"), function("vowels")], "a name of its own"),
        ([{"name": "x", "kind": "model"}], "needs a source"),
        ([{"name": "x", "kind": "preferences", "source": "f"}], "takes no source"),
    ],
)
def test_lists_that_cannot_be_are_refused(rewards, sources, message):
    with pytest.raises(ConfigError, match=message):
        rewards(*sources)


def save_classifier(manifest, folder: Path, labels: int) -> Qwen3ForSequenceClassification:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        id2label={number: f"label{number}" for number in range(labels)},
        label2id={f"label{number}": number for number in range(labels)},
    )
    model = Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(manifest.tokenizer_folder).save_pretrained(folder)
    return model


def test_classifier_gives_the_log_odds_of_its_label(rewards, sequences, manifest, tmp_path):
    model = save_classifier(manifest, tmp_path / "judge", 3)
    source = {"name": "judge", "kind": "classifier", "source": str(tmp_path / "judge"), "label": "label1"}
    scores = rewards(source).score(sequences)
    for row in range(4):
        response = sequences.responses[row][sequences.response_mask[row]]
        shares = model(response[None]).logits[0].softmax(-1)
        assert float(scores[row]) == pytest.approx(float(torch.logit(shares[1].detach())), abs=1e-4)
    with pytest.raises(CheckpointError, match="has no label 'x'; it has label0, label1"):
        rewards({**source, "label": "x"})
    with pytest.raises(CheckpointError, match="holds no classifier"):
        rewards({**source, "source": str(tmp_path)})


def test_classifier_of_one_output_gives_it_as_it_is(rewards, sequences, manifest, tmp_path):
    model = save_classifier(manifest, tmp_path / "judge", 1)
    scores = rewards({"name": "judge", "kind": "classifier", "source": str(tmp_path / "judge")}).score(sequences)
    response = sequences.responses[3][sequences.response_mask[3]]
    assert float(scores[3]) == pytest.approx(float(model(response[None]).logits[0, 0].detach()), abs=1e-4)


def test_run_with_a_function_trains_no_reward_model_and_raises_its_reward(config, manifest, dense_folder):
    overrides = [
        f"rlhf.rewards={json.dumps([function('vowels', 10.0)])}",
        "rlhf.rlhf_iterations=10",
        "rlhf.ppo_batch_size=32",
        "rlhf.policy_learning_rate=3e-3",
        "rlhf.target_kl=20",
    ]
    result = align(override_config(config, overrides), manifest=manifest, run_name="r", init_from=dense_folder)
    folder = Path(result.output_dir)
    assert not (folder / "reward_model").exists()
    found = [row["rlhf/reward/vowels"] for row in read_metrics(folder / "metrics.jsonl") if "rlhf/reward/vowels" in row]
    assert len(found) == 10
    assert found[-1] > found[0] + 0.05
    assert "rlhf/reward_accuracy" not in result.metrics


def test_reward_models_of_other_runs_and_of_this_one_go_together(config, manifest, dense_folder, tokenizer, tmp_path):
    model = load_model(dense_folder).eval()
    pairs = make_pairs(config, manifest, tokenizer, model, ALONE)
    trained = RewardTrainer(config, model, manifest.pad_id, ALONE).fit(pairs, lambda *_: None)
    save_reward_model(trained, manifest.tokenizer_folder, tmp_path / "earlier")
    sources = [
        {"name": "own", "kind": "preferences"},
        {"name": "earlier", "kind": "model", "source": str(tmp_path / "earlier"), "weight": 0.5},
    ]
    overrides = [f"rlhf.rewards={json.dumps(sources)}", "rlhf.rlhf_iterations=1"]
    result = align(override_config(config, overrides), manifest=manifest, run_name="r", init_from=dense_folder)
    own, earlier = result.metrics["rlhf/reward/own"], result.metrics["rlhf/reward/earlier"]
    first = read_metrics(Path(result.output_dir) / "metrics.jsonl")[0]
    assert own == pytest.approx(earlier, abs=1e-5)  # made from the same pairs in the same way
    assert first["rlhf/reward"] == pytest.approx(own + 0.5 * earlier, abs=1e-5)
    assert "rlhf/reward_accuracy" in result.metrics


def test_reward_model_that_breaks_is_told_of(config, manifest, dense_folder, tokenizer, sequences):
    model = load_model(dense_folder).eval()
    pairs = make_pairs(config, manifest, tokenizer, model, ALONE)
    trained = RewardTrainer(config, model, manifest.pad_id, ALONE).fit(pairs, lambda *_: None)
    trained.head.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="scored 4 of 4 responses"):
        make_rewards(config.rlhf, trained, tokenizer, ALONE.device).score(sequences)
