from ultrathink_model.reporting.alignment import alignment_charts, alignment_facts
from ultrathink_model.reporting.stages import read_stage


def test_each_reward_has_a_chart_of_its_own_after_the_sum(make_stage):
    rows = [{"rlhf/reward": 0.1 * n, "rlhf/reward/tone": 0.2 * n, "rlhf/reward/length": -n} for n in range(4)]
    charts = alignment_charts([read_stage(make_stage("aligned", rows), 1)])
    assert [chart.title for chart in charts] == ["Reward", "Reward: tone", "Reward: length"]


def test_constitutional_figures_are_told_before_and_after(make_stage):
    row = {
        "constitutional/prompts": 20,
        "constitutional/revised": 18,
        "constitutional/preferences": 12,
        "eval/safety/harmful_before": 0.5,
        "eval/safety/harmful_after": 0.25,
    }
    facts = dict(alignment_facts(read_stage(make_stage("constitutional", [row]), 1)))
    assert facts["answers that were revised and learnt from"] == "18 of 20"
    assert facts["preferences that the critic gave"] == "12"
    assert "50.0 % → 25.0 %" in facts.values()
