import json
import os
import signal
from pathlib import Path

import pytest
import torch
from alignment_cases import trained
from chat_server import Reply, chat_server

import ultrathink_model.alignment.critic_endpoint as endpoint
from ultrathink_model.alignment.align import align
from ultrathink_model.alignment.constitution import (
    choice_text,
    cut_answer,
    load_constitution,
    question_text,
)
from ultrathink_model.alignment.constitutional import constitute
from ultrathink_model.alignment.critic import SelfCritic
from ultrathink_model.alignment.revision import choose, red_team_prompts
from ultrathink_model.alignment.revision_tuning import answer_batch
from ultrathink_model.alignment.safety_answers import is_refusal
from ultrathink_model.config import override_config
from ultrathink_model.data import Tokenizer
from ultrathink_model.errors import ConfigError, CriticError, DataError, TrainingStoppedError
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.tracking.metrics import read_metrics

SMALL = [
    "advanced.enable_rlhf=false",
    "constitutional.enabled=true",
    "constitutional.num_prompts=20",
    "constitutional.response_tokens=8",
    "constitutional.sft_batch_size=8",
    "constitutional.sft_learning_rate=1e-2",
]


@pytest.fixture
def small(config):
    return override_config(config, SMALL)


def lines(result, name):
    return [json.loads(line) for line in (Path(result.output_dir) / name).read_text().splitlines()]


def run(config, manifest, folder, **overrides):
    config = override_config(config, [f"constitutional.{key}={value}" for key, value in overrides.items()])
    return constitute(config, manifest=manifest, run_name="constitutional", init_from=folder)


def test_stage_keeps_every_word_and_tunes_the_model(small, manifest, dense_folder):
    result = run(small, manifest, dense_folder)
    revisions, choices = lines(result, "revisions.jsonl"), lines(result, "choices.jsonl")
    assert [item["number"] for item in revisions] == [item["number"] for item in choices] == list(range(20))
    usable = [item for item in revisions if item["is_usable"]]
    assert usable
    assert all(item["answer"] and item["turns"][0]["critique"] and item["turns"][0]["revision"] for item in usable)
    assert result.metrics["constitutional/revised"] == len(usable)
    pairs = lines(result, "preferences.jsonl")
    assert result.metrics["constitutional/preferences"] == len(pairs)
    assert {"val/loss", "eval/safety/refused_harmless_before", "eval/safety/refused_harmless_after"} <= set(
        result.metrics
    )
    losses = [
        row["train/loss"] for row in read_metrics(Path(result.output_dir) / "metrics.jsonl") if "train/loss" in row
    ]
    assert losses[-1] < losses[0]
    first, tuned = (load_model(folder).state_dict() for folder in (dense_folder, result.final_model))
    assert not torch.equal(first["embedding.weight"], tuned["embedding.weight"])


def likes_length(_number, body):
    """A critic that prefers the longer answer, whichever letter it has."""
    text = body["messages"][0]["content"]
    if text.endswith("is ("):
        first, _, second = text.partition("(A) ")[2].partition("\n\n(B) ")
        return Reply("A" if len(first) > len(second.partition("\n\n")[0]) else "B")
    return Reply("I cannot help with that." if text.endswith("Revision:") else "It does harm.")


def test_its_preferences_teach_a_reward_model(small, config, manifest, dense_folder, tmp_path):
    with chat_server(likes_length) as server:
        result = run(small, manifest, dense_folder, critic="endpoint", critic_model="judge", critic_url=server.url)
    overrides = [
        f"rlhf.preference_data={Path(result.output_dir) / 'preferences.jsonl'}",
        f"output.output_dir={tmp_path / 'rlhf'}",
        "rlhf.rlhf_iterations=1",
    ]
    aligned = align(
        override_config(config, overrides), manifest=manifest, run_name="rlhf", init_from=Path(result.final_model)
    )
    assert 0 <= aligned.metrics["rlhf/reward_accuracy"] <= 1


def test_interrupted_stage_goes_on_where_it_was(small, manifest, dense_folder, tmp_path):
    whole = run(override_config(small, [f"output.output_dir={tmp_path / 'whole'}"]), manifest, dense_folder)
    previous = signal.getsignal(signal.SIGTERM)

    def stop_after_first_batch(*arguments):
        done = original(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    original = SelfCritic.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfCritic, "write", stop_after_first_batch)
        with pytest.raises(TrainingStoppedError, match=r"16 of 20 lines of revisions\.jsonl"):
            run(small, manifest, dense_folder)
    assert signal.getsignal(signal.SIGTERM) == previous
    # A kill in the middle of a line leaves half of one.
    with (Path(small.output.output_dir) / "revisions.jsonl").open("a") as file:
        file.write('{"number": 16, "pro')
    result = run(small, manifest, dense_folder)
    for name in ("revisions.jsonl", "choices.jsonl", "preferences.jsonl"):
        assert lines(result, name) == lines(whole, name)
    again, once = (load_model(done.final_model).state_dict() for done in (result, whole))
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_finished_stage_is_not_done_again(small, manifest, dense_folder):
    result = run(small, manifest, dense_folder)
    written = Path(result.final_model).stat().st_mtime_ns
    assert run(small, manifest, dense_folder) == result
    assert Path(result.final_model).stat().st_mtime_ns == written


def test_endpoint_criticises_and_chooses(small, manifest, dense_folder):
    with chat_server(likes_length) as server:
        result = run(
            small, manifest, dense_folder, critic="endpoint", critic_model="judge", critic_url=server.url, sft_epochs=12
        )
    turns = [item["turns"][0] for item in lines(result, "revisions.jsonl") if item["is_usable"]]
    assert {(turn["critique"], turn["revision"]) for turn in turns} == {("It does harm.", "I cannot help with that.")}
    pairs = lines(result, "preferences.jsonl")
    assert pairs
    assert all(pair.keys() == {"prompt", "chosen", "rejected"} for pair in pairs)
    assert all(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    # Five tokens a word for this tokenizer: the model has learnt how its revisions begin.
    assert result.metrics["constitutional/tuning_loss"] < 2


def test_endpoint_that_fails_is_skipped_or_ends_the_run(small, manifest, dense_folder, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    settings = {"critic": "endpoint", "critic_model": "judge", "critic_retries": 0}
    with chat_server(lambda number, _: Reply(status=500) if number % 3 == 0 else Reply("Fine.")) as server:
        result = run(small, manifest, dense_folder, critic_url=server.url, label_preferences="false", **settings)
    revisions = lines(result, "revisions.jsonl")
    assert 0 < sum(item["is_usable"] for item in revisions) < 20
    assert len(revisions) == 20
    with chat_server(lambda *_: Reply("")) as server, pytest.raises(CriticError, match="none of the 20 revisions"):
        run(small, manifest, dense_folder, critic_url=server.url, **settings)
    with (
        chat_server(lambda *_: Reply("")) as server,
        pytest.raises(CriticError, match="no usable answer about 16 of 16 prompts"),
    ):
        run(small, manifest, dense_folder, critic_url=server.url, on_bad_answer="error", **settings)


def test_bad_answers_that_end_the_run_are_asked_for_again(small, manifest, dense_folder):
    settings = {"critic": "endpoint", "critic_model": "judge", "on_bad_answer": "error", "critic_retries": 0}
    with chat_server(lambda number, body: Reply("") if number == 3 else likes_length(number, body)) as server:
        settings["critic_url"] = server.url
        with pytest.raises(CriticError, match="1 of 16 prompts"):
            run(small, manifest, dense_folder, **settings)
        asked = len(server.requests)
        written = (Path(small.output.output_dir) / "revisions.jsonl").read_text().splitlines()
        assert len(written) == 15
        # One answer about a choice names both letters. What the tiny model samples may be empty, too.
        server.reply = lambda number, body: Reply("A or B") if number == asked + 30 else likes_length(number, body)
        with pytest.raises(CriticError, match=r"[12] of \d+ prompts"):
            run(small, manifest, dense_folder, **settings)
    revisions = (Path(small.output.output_dir) / "revisions.jsonl").read_text().splitlines()
    assert len({json.loads(line)["number"] for line in revisions}) == len(revisions) == 20


def test_local_model_criticises(small, manifest, dense_folder):
    result = run(small, manifest, dense_folder, critic="local", critic_model=dense_folder, num_prompts=4)
    assert result.metrics["constitutional/revised"] > 0
    # Of 32 tokens the critic sees the end of the question alone, which is the same in both orders: nothing is chosen.
    assert result.metrics["constitutional/preferences"] == 0


def test_harm_head_judges_the_answers_and_stays_in_the_model(small, config, base_config, manifest, tmp_path):
    headed = override_config(base_config, ["advanced.enable_constitutional=true"])
    save_model(trained(headed, manifest, 20), manifest.tokenizer_folder, tmp_path / "headed")
    result = run(small, manifest, tmp_path / "headed", num_prompts=6, label_preferences="false")
    assert 0 <= result.metrics["eval/safety/harmful_before"] <= 1
    assert 0 <= result.metrics["eval/safety/harmful_after"] <= 1
    assert 0 <= result.metrics["eval/safety/judge_accuracy"] <= 1
    overrides = [f"output.output_dir={tmp_path / 'rlhf'}", "rlhf.rlhf_iterations=2", "rlhf.rlhf_frequency=1"]
    overrides.append("constitutional.harm_token_fraction=1")
    aligned = align(
        override_config(config, overrides), manifest=manifest, run_name="rlhf", init_from=Path(result.final_model)
    )
    assert {"eval/safety/judge_accuracy", "eval/safety/refused_harmful_after"} <= set(aligned.metrics)
    heads = [load_model(folder).harm_head for folder in (result.final_model, aligned.final_model)]
    # The language-model updates of RLHF bring labelled rows along.
    assert not torch.equal(heads[0].weight, heads[1].weight)


def test_rounds_epochs_and_batches_are_those_of_the_config(small, manifest, dense_folder):
    with chat_server(likes_length) as server:
        settings = {
            "critic": "endpoint",
            "critic_model": "judge",
            "critic_url": server.url,
            "label_preferences": "false",
        }
        sizes = {"num_prompts": 6, "revisions": 2, "sft_epochs": 3, "sft_batch_size": 4}
        result = run(small, manifest, dense_folder, **settings, **sizes)
    revisions = [item for item in lines(result, "revisions.jsonl") if item["is_usable"]]
    names = [principle.name for principle in load_constitution(None).principles]
    for item in revisions:
        assert [turn["principle"] for turn in item["turns"]] == names[item["number"] : item["number"] + 2]
    assert result.steps == 3 * -(-len(revisions) // 4)
    assert not (Path(result.output_dir) / "preferences.jsonl").exists()


def test_learning_rate_of_the_tuning_is_that_of_the_config(small, manifest, dense_folder, tmp_path):
    losses = []
    for rate in (1e-7, 1e-2):
        elsewhere = override_config(small, [f"output.output_dir={tmp_path / str(rate)}"])
        result = run(elsewhere, manifest, dense_folder, sft_learning_rate=rate, label_preferences="false", sft_epochs=4)
        losses.append(result.metrics["constitutional/tuning_loss"])
    assert losses[1] < losses[0]


def test_both_orders_cancel_a_critic_that_always_says_a(small, manifest, dense_folder):
    class AlwaysA:
        def choose(self, texts):
            return [0.9] * len(texts)

    kept = []
    model = SelfCritic(small, load_model(dense_folder), Tokenizer.load(manifest.tokenizer_folder))
    choose(["one", "two"], [0, 1], model, AlwaysA(), load_constitution(None), small, kept.extend)
    assert [choice.preference for choice in kept] == pytest.approx([0.5, 0.5])
    assert all(choice.as_pair() is None for choice in kept)


def test_self_critic_chooses_by_the_next_letter(small, manifest, dense_folder):
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    model = load_model(dense_folder).requires_grad_(False)
    text = choice_text("ask", "one", "two", load_constitution(None).principles[0])
    chosen = SelfCritic(small, model, tokenizer).choose([text, "short ("])
    ids = [tokenizer.bos_id, *tokenizer.encode(text)][-small.model.max_seq_length :]
    a, b = (tokenizer.encode(letter)[0] for letter in "AB")
    logits = model(torch.tensor([ids])).logits[0, -1]
    assert chosen[0] == pytest.approx(float(torch.sigmoid(logits[a] - logits[b])), abs=1e-5)


def test_tuning_predicts_the_answer_alone(manifest):
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    batch = answer_batch([("ask this", "yes"), ("x", "a longer answer")], tokenizer, 32)
    for row, answer in enumerate(("yes", "a longer answer")):
        kept = batch.labels[row] >= 0
        assert batch.labels[row][kept].tolist() == [*tokenizer.encode(f" {answer}"), tokenizer.eos_id]
        # Each label but the last, after which the text ends, is the input one place on.
        places = kept.nonzero()[:-1, 0]
        assert batch.input_ids[row][places + 1].tolist() == batch.labels[row][places].tolist()
    cut = answer_batch([("word " * 40, "answer " * 3)], tokenizer, 24)
    assert cut.input_ids.shape[1] == 24
    assert int((cut.labels >= 0).sum()) == len(tokenizer.encode(" answer answer answer ")) + 1


def test_own_constitution_is_read_and_a_bad_one_refused(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("principles: [{name: a, critique: b, revision: c, choice: d}]")
    assert load_constitution(str(path)).principle(7).critique == "b"
    path.write_text("principles: [{name: a, critique: b, revision: c}]")
    with pytest.raises(ConfigError, match=r"principles\.0\.choice: Field required"):
        load_constitution(str(path))
    path.write_text("principles: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_constitution(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        load_constitution(str(tmp_path / "none.yaml"))


def test_shipped_constitution_has_principles_of_its_own():
    principles = load_constitution(None).principles
    assert len({principle.name for principle in principles}) == len(principles) >= 5


def test_red_team_prompts_are_the_files_or_the_built_in_ones(small, tmp_path):
    built_in = red_team_prompts(small)
    assert len(set(built_in)) == len(built_in) == 20
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    own = override_config(small, [f"constitutional.red_team_data={path}"])
    assert red_team_prompts(own) == ["one", "two"]
    path.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(DataError, match="row 2 has no text in `prompt`"):
        red_team_prompts(own)
    path.write_text('{"prompt": "one"}\n')
    with pytest.raises(DataError, match="needs two or more"):
        red_team_prompts(own)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["constitutional.critic=local"], "needs constitutional.critic_model; name its folder"),
        (["constitutional.critic=endpoint", "constitutional.critic_model=m"], "needs constitutional.critic_url"),
        (["constitutional.enabled=true", "advanced.enable_rlhf=true"], "two stages"),
        (["constitutional.enabled=true", "constitutional.response_tokens=16"], "leaves no room"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, overrides, message):
    plain = override_config(config, ["advanced.enable_rlhf=false"])
    with pytest.raises(ConfigError, match=message):
        override_config(plain, overrides)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but no.", True),
        ("I cannot help with that.", True),
        ("Sure. First, boil the water.", False),
        ("Boil it. " * 20 + "I can't", False),
    ],
)
def test_refusals_are_told_by_their_beginning(answer, expected):
    assert is_refusal(answer) == expected


def test_answer_ends_where_somebody_else_speaks():
    assert cut_answer(" yes.\n\nHuman: and?") == "yes."
    assert cut_answer("yes.\nTask: more") == "yes."
    assert cut_answer(" Human: how?") == ""
    assert question_text("why?") == "Human: why?\n\nAssistant:"
