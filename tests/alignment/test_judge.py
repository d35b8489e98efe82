from types import SimpleNamespace

import pytest
import torch
from chat_server import Reply, chat_server

from ultrathink_model.alignment.judge import ClassifierJudge, CriticJudge, harmful_share, judge_accuracy, make_judge
from ultrathink_model.config import override_config
from ultrathink_model.data.safety import LabelledText
from ultrathink_model.errors import CheckpointError, ConfigError
from ultrathink_model.models.hf import load_model

TEXTS = [LabelledText(text, labels, "t") for text, labels in (("bomb", ("violence",)), ("poison", ("violence",)))]
TEXTS += [LabelledText(text, (), "t") for text in ("bread", "bomb site museum")]


def finds_bombs(texts):
    return [0.9 if "bomb" in text else 0.1 for text in texts]


def test_share_counts_what_is_judged():
    assert harmful_share(finds_bombs, ["a bomb", "bread", "cake", "cake"]) == 0.25
    assert harmful_share(lambda texts: [0.9, None, 0.2], ["a", "b", "c"]) == 0.5
    assert harmful_share(lambda texts: [None], ["a"]) is None
    assert harmful_share(finds_bombs, []) is None


def test_accuracy_weighs_harmful_and_harmless_texts_alike():
    assert judge_accuracy(finds_bombs, TEXTS) == 0.5
    assert judge_accuracy(finds_bombs, TEXTS[:3]) == 0.75
    assert judge_accuracy(finds_bombs, TEXTS[:2]) is None


def test_critic_that_always_says_a_finds_nothing_out():
    critic = SimpleNamespace(choose=lambda texts: [0.8] * len(texts))
    assert CriticJudge(critic)(["one", "two"]) == pytest.approx([0.5, 0.5])


def test_endpoint_judges_and_its_silence_is_no_judgement(config, manifest, dense_folder):
    def answer(_number, body):
        text = body["messages"][0]["content"]
        if "riddle" in text:
            return Reply("who knows")
        return Reply("A" if ("bomb" in text) == ("(A) yes" in text) else "B")

    with chat_server(answer) as server:
        section = ["judge=critic", "critic=endpoint", "critic_model=m", f"critic_url={server.url}", "critic_retries=0"]
        judged = override_config(config, [f"constitutional.{item}" for item in section])
        stage = SimpleNamespace(config=judged, tokenizer=None, manifest=manifest)
        judge = make_judge(stage, load_model(dense_folder))
        assert judge(["a bomb", "bread", "a riddle"]) == [1.0, 0.0, None]
    assert len(server.requests) == 6


def test_classifier_gives_the_probability_of_its_label():
    judge = ClassifierJudge(lambda prompts, texts: torch.tensor([0.0, 2.0]))
    assert judge(["a", "b"]) == pytest.approx([0.5, 0.8808], abs=1e-4)


def test_model_without_a_harm_head_has_no_judge(config, manifest, dense_folder):
    stage = SimpleNamespace(config=config, tokenizer=None, manifest=manifest)
    assert make_judge(stage, load_model(dense_folder)) is None


def test_judge_that_cannot_be_had_is_refused(config, manifest, dense_folder, tmp_path):
    with pytest.raises(ConfigError, match="a classifier needs its folder"):
        override_config(config, ["constitutional.judge=classifier"])
    with pytest.raises(ConfigError, match="no other judge reads it"):
        override_config(config, ["constitutional.judge_model=x"])
    named = override_config(config, ["constitutional.judge=classifier", f"constitutional.judge_model={tmp_path}"])
    stage = SimpleNamespace(
        config=named, tokenizer=None, manifest=manifest, context=SimpleNamespace(device=torch.device("cpu"))
    )
    with pytest.raises(CheckpointError, match=r"constitutional\.judge_model: .* holds no classifier"):
        make_judge(stage, load_model(dense_folder))
