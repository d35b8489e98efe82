"""The plans of the workflows: which config each step gets."""

import pytest

from ultrathink_model.errors import ConfigError
from ultrathink_model.workflow import WORKFLOWS, input_signature, plan_hash, plan_workflow


@pytest.mark.parametrize("workflow", WORKFLOWS)
@pytest.mark.parametrize("profile", ["tiny", "small", "medium", "large"])
def test_every_workflow_plans_for_every_profile(workflow, profile):
    plan = plan_workflow(workflow, profile, overrides=["advanced.enable_constitutional=true"])
    assert [step.number for step in plan.steps.values()] == list(range(1, len(plan.steps) + 1))
    for stage in WORKFLOWS[workflow].stages:
        assert plan[stage.name].config.output.output_dir == str(plan.folder / stage.name)


def test_production_adds_the_features_stage_by_stage():
    plan = plan_workflow("production", "tiny")
    switches = [
        (config.enable_moe, config.enable_dre, config.enable_rlhf)
        for config in (plan[stage].config.advanced for stage in ("baseline", "advanced", "rlhf"))
    ]
    assert switches == [(False, False, False), (True, True, False), (True, True, True)]
    assert plan["rlhf"].config.training.learning_rate == 1e-5


def test_the_constitutional_stage_is_there_only_when_it_is_asked_for():
    assert list(plan_workflow("production", "tiny").steps) == [
        name for name in WORKFLOWS["production"].steps if "constitutional" not in name
    ]
    for override in ("advanced.enable_constitutional=true", "constitutional.enabled=true"):
        plan = plan_workflow("production", "tiny", overrides=[override, "distributed.enabled=true"])
        names = list(plan.steps)
        assert names[names.index("constitutional") - 1 :][:3] == ["advanced", "constitutional", "reward"]
        runs = [plan[name].config.constitutional.enabled for name in ("baseline", "advanced", "constitutional", "rlhf")]
        assert runs == [False, False, True, False]
        assert not plan["constitutional"].config.distributed.enabled
        assert plan["rlhf"].config.distributed.enabled
    with pytest.raises(ConfigError, match="has that stage only with"):
        plan_workflow("production", "tiny", overrides=["constitutional:constitutional.revisions=2"])


def test_the_reward_stage_depends_on_its_own_keys_alone_and_is_left_out_without_preferences():
    before = plan_workflow("production", "tiny")
    after = plan_workflow("production", "tiny", overrides=["rlhf.ppo_epochs=5"])
    assert plan_hash(before["reward"]) == plan_hash(after["reward"])
    assert plan_hash(before["rlhf"]) != plan_hash(after["rlhf"])
    other = plan_workflow("production", "tiny", overrides=["rlhf.reward_epochs=7"])
    assert plan_hash(before["reward"]) != plan_hash(other["reward"])
    rewards = "rlhf.rewards=[{name: a, kind: callable, source: 'm:f'}]"
    assert "reward" not in plan_workflow("production", "tiny", overrides=[rewards]).steps
    with pytest.raises(ConfigError, match=r"only with a reward of kind preferences"):
        plan_workflow("production", "tiny", overrides=[rewards, "reward:rlhf.reward_epochs=2"])


def test_prototype_checks_on_dummy_data_whatever_the_run_trains_on():
    plan = plan_workflow("prototype", "tiny", overrides=["data.dataset=wikitext", "data.text_column=body"])
    assert (plan["check"].config.data.dataset, plan["check"].config.data.text_column) == ("dummy", None)
    assert plan["pretrain"].config.data.dataset == "wikitext"


def test_a_multimodal_prototype_mixes_digits_into_the_built_in_text():
    on = ["advanced.enable_multimodal=true"]
    plan = plan_workflow("prototype", "tiny", overrides=on)
    assert plan["pretrain"].config.data.mix_datasets == "sotu:0.25,digits:0.75"
    assert "sotu has neither images nor sound, so `digits` is mixed in" in plan.reason
    assert plan["check"].config.data.mix_datasets is None
    for own in ("data.dataset=wikitext", "data.mix_datasets=sotu:0.3,dummy:0.7"):
        other = plan_workflow("prototype", "tiny", overrides=[*on, own])
        assert other["pretrain"].config.data.mix_datasets == (None if "wikitext" in own else "sotu:0.3,dummy:0.7")
        assert "digits" not in other.reason
    assert plan_workflow("prototype", "tiny")["pretrain"].config.data.mix_datasets is None


def test_media_beside_a_file_of_rows_and_encoders_are_inputs(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}", encoding="utf-8")
    overrides = [f"data.dataset={tmp_path / 'rows.jsonl'}"]
    plans = {}
    for on in ("false", "true"):
        overrides_of = [*overrides, f"advanced.enable_multimodal={on}"]
        plans[on] = [plan_workflow("multi_gpu", "tiny", overrides=overrides_of)["prepare_data"].inputs]
        (tmp_path / f"{on}.png").write_bytes(b"x")
        plans[on].append(plan_workflow("multi_gpu", "tiny", overrides=overrides_of)["prepare_data"].inputs)
    assert plans["false"][0] == plans["false"][1]
    assert plans["true"][0] != plans["true"][1]


def test_an_override_reaches_all_stages_or_the_one_it_names():
    plan = plan_workflow("production", "tiny", overrides=["training.num_epochs=3", "advanced:training.num_epochs=5"])
    epochs = [plan[stage].config.training.num_epochs for stage in ("baseline", "advanced", "rlhf")]
    assert epochs == [3, 5, 3]


def test_a_users_override_wins_over_a_stages_default():
    plan = plan_workflow("production", "tiny", overrides=["advanced.enable_moe=false", "training.learning_rate=0.1"])
    assert not plan["advanced"].config.advanced.enable_moe
    assert plan["baseline"].config.training.learning_rate == 0.1
    assert plan["rlhf"].config.training.learning_rate == 1e-5


def test_a_value_with_a_colon_names_no_stage():
    plan = plan_workflow("prototype", "tiny", overrides=["data.mix_datasets=sotu:0.3,dummy:0.7"])
    assert plan["pretrain"].config.data.mix_datasets == "sotu:0.3,dummy:0.7"


def test_tuning_one_stage_leaves_the_plans_of_the_others():
    before = plan_workflow("production", "tiny")
    after = plan_workflow("production", "tiny", overrides=["rlhf.ppo_epochs=2", "moe.load_balance_weight=0.5"])
    changed = {name for name in before.steps if plan_hash(before[name]) != plan_hash(after[name])}
    assert changed == {
        "advanced",
        "reward",
        "rlhf",
        "evaluate_advanced",
        "evaluate_rlhf",
        "gate",
        "export",
        "report",
        "promote",
    }


def test_the_gates_are_read_by_the_steps_that_promote_alone(tmp_path):
    (tmp_path / "gates.yaml").write_text("[{metric: eval/x, direction: lower, bound: 1}]", encoding="utf-8")
    before = plan_workflow("production", "tiny")
    after = plan_workflow("production", "tiny", overrides=[f"promotion.gates_file={tmp_path / 'gates.yaml'}"])
    assert {name for name in before.steps if plan_hash(before[name]) != plan_hash(after[name])} == {"gate", "promote"}
    with pytest.raises(ConfigError, match=r"promotion\.gates_file=nowhere\.yaml"):
        plan_workflow("production", "tiny", overrides=["promotion.gates_file=nowhere.yaml"])


def test_a_changed_input_file_changes_the_plan(tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("one", encoding="utf-8")
    overrides = [f"data.dataset={text}"]
    before = plan_workflow("multi_gpu", "tiny", overrides=overrides)
    assert plan_workflow("multi_gpu", "tiny", overrides=overrides) == before
    text.write_text("another", encoding="utf-8")
    assert plan_hash(plan_workflow("multi_gpu", "tiny", overrides=overrides)["pretrain"]) != plan_hash(
        before["pretrain"]
    )


def test_folders_and_globs_count_as_input_files(tmp_path, tiny_config):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    signatures = set()
    for dataset in (str(tmp_path), str(tmp_path / "*.txt"), "sotu"):
        data = tiny_config.data.model_copy(update={"dataset": dataset})
        signatures.add(input_signature(tiny_config.model_copy(update={"data": data})))
    assert len(signatures) == 2  # the folder and the glob hold the same file; the built-in corpus is none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workflow": "prod"}, "take one of prototype, production, multi_gpu"),
        ({"profile": "tiny", "config": "configs/train_tiny.yaml"}, "take one of them"),
        (
            {"profile": "tiny", "overrides": ["sft:training.max_steps=1"]},
            "its stages are baseline, advanced, constitutional, reward, rlhf",
        ),
        ({"profile": "tiny", "overrides": ["rlhf:training.max_step=1"]}, r"Did you mean training\.max_steps"),
        ({"config": "nowhere.yaml"}, "No such file"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        plan_workflow(**{"workflow": "production", **arguments})
