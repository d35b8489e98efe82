"""The production workflow with Constitutional AI: its stage stands before RLHF, which learns from its preferences."""

import json

import pytest
import yaml

from pipelines.production import production_pipeline
from ultrathink_model.config import load_config
from ultrathink_model.workflow import WORKFLOWS

pytestmark = [
    pytest.mark.slow,
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]

OVERRIDES = [
    # The critic must read both answers, and a token is hardly more than a letter here.
    "model.max_seq_length=512",
    "training.max_steps=20",
    "constitutional.num_prompts=16",
    "constitutional.response_tokens=8",
    "constitutional.holdout_fraction=0.1",
]


def test_constitutional_stage_hands_its_model_and_its_preferences_to_rlhf(workspace):
    values = yaml.safe_load((workspace / "small.yaml").read_text())
    (workspace / "guarded.yaml").write_text(yaml.safe_dump({**values, "advanced": {"enable_constitutional": True}}))
    done = production_pipeline(config="guarded.yaml", overrides=OVERRIDES)
    assert done.status == "completed"
    assert tuple(sorted(done.steps, key=lambda name: done.steps[name].start_time)) == WORKFLOWS["production"].steps
    folder = workspace / "outputs" / "small" / "production"
    for name in ("revisions.jsonl", "choices.jsonl", "preferences.jsonl", "final_model/model.safetensors"):
        assert (folder / "constitutional" / name).is_file()
    preferences = folder / "constitutional" / "preferences.jsonl"
    assert load_config(folder / "reward" / "config.yaml").rlhf.preference_data == str(preferences)
    assert load_config(folder / "rlhf" / "config.yaml").rlhf.reward_run == str(folder / "reward")
    chosen = {json.loads(line)["chosen"].strip() for line in preferences.read_text().splitlines()}
    learnt = [json.loads(line)["chosen"] for line in (folder / "rlhf" / "pairs.jsonl").read_text().splitlines()]
    assert learnt
    assert all(any(text.strip() in side for side in chosen) for text in (line.split("<|")[0] for line in learnt))
    assert not load_config(folder / "baseline" / "config.yaml").advanced.enable_constitutional
    evaluation = json.loads((folder / "rlhf" / "evaluation.json").read_text())
    assert any(name.startswith("eval/safety/auc_") for name in evaluation["metrics"])
    assert json.loads((folder / "export" / "config.json").read_text())["architectures"] == ["UltrathinkForCausalLM"]
    again = production_pipeline(config="guarded.yaml", overrides=OVERRIDES)
    # The gate looks at what is in production now, and what follows on it looks at the gate.
    made_again = {name for name, step in again.steps.items() if str(step.status) != "cached"}
    assert made_again == {"gate", "report", "promote"}
