"""Alignment by iteration: reward, distance from the reference, and the reward model's worth."""

from collections.abc import Sequence

from ultrathink_model.reporting.chart import Level, LineChart, Series
from ultrathink_model.reporting.stages import Stage

# Chart title, metric and unit, in the order of the page; reward and KL come first.
CHARTS = (
    ("Reward", "rlhf/reward", "mean score of a response"),
    ("Distance from the reference", "rlhf/kl", "KL, nats per response"),
    ("KL weight", "rlhf/kl_weight", "reward per nat"),
    ("Entropy", "rlhf/entropy", "nats per token"),
    ("Policy loss", "rlhf/policy_loss", "per token"),
    ("Value loss", "rlhf/value_loss", "squared error"),
    ("Loss of the reward model", "rlhf/reward_train_loss", "nats per pair"),
    ("Held-out accuracy", "rlhf/reward_accuracy", "share of pairs ranked right"),
)

# One reward of several.
PART_PREFIX = "rlhf/reward/"


def alignment_charts(stages: Sequence[Stage]) -> list[LineChart]:
    """A chart for each quantity that changed over the iterations of any stage."""
    charts = []
    parts = dict.fromkeys(name for stage in stages for name in stage.metric_names(PART_PREFIX))
    own = [(f"Reward: {name.removeprefix(PART_PREFIX)}", name, "mean of a response, unweighted") for name in parts]
    for title, metric, unit in (*CHARTS[:1], *own, *CHARTS[1:]):
        curves = [(stage, *stage.curve(metric, "step")) for stage in stages]
        series = [Series(stage.name, stage.number, x, y) for stage, x, y in curves if len(x) > 1]
        if series:
            levels = _targets(stages) if metric == "rlhf/kl" else []
            charts.append(LineChart(title, unit, "iteration", series, levels))
    return charts


def alignment_facts(stage: Stage) -> list[tuple[str, str]]:
    """What alignment came to in one stage, Constitutional AI too: a name and a value each; empty for a stage without."""
    facts = _constitutional_facts(stage)
    accuracy = stage.last("rlhf/reward_accuracy")
    if accuracy is not None:
        by_length = stage.last("rlhf/length_accuracy")
        beside = f" (by length alone {100 * by_length:.1f} %)" if by_length is not None else ""
        facts.append(("reward model, held-out pairs ranked right", f"{100 * accuracy:.1f} %{beside}"))
    before, after = stage.last("rlhf/heldout_reward_before"), stage.last("rlhf/heldout_reward")
    if before is not None and after is not None:
        facts.append(("mean reward on held-out prompts, before and after", f"{before:.3f} → {after:.3f}"))
    _, rewards = stage.curve("rlhf/reward", "step")
    if rewards:
        tenth = max(1, len(rewards) // 10)
        first, last = sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth
        facts.append(
            (f"mean reward, first and last {tenth} iteration{'s' if tenth > 1 else ''}", f"{first:.3f} → {last:.3f}")
        )
    _, kl = stage.curve("rlhf/kl", "step")
    target = stage.setting("rlhf", "target_kl")
    if kl:
        bound = f" (target {target:g})" if isinstance(target, int | float) else ""
        facts.append(("largest KL, nats per response", f"{max(kl):.2f}{bound}"))
    return facts


def _constitutional_facts(stage: Stage) -> list[tuple[str, str]]:
    """What Constitutional AI came to in a stage."""
    facts = []
    prompts, revised = stage.last("constitutional/prompts"), stage.last("constitutional/revised")
    if prompts is not None and revised is not None:
        facts.append(("answers that were revised and learnt from", f"{revised:.0f} of {prompts:.0f}"))
    preferences = stage.last("constitutional/preferences")
    if preferences is not None:
        facts.append(("preferences that the critic gave", f"{preferences:.0f}"))
    accuracy = stage.last("eval/safety/judge_accuracy")
    if accuracy is not None:
        facts.append(("labelled texts that the judge of harm gets right (50 % is chance)", f"{100 * accuracy:.1f} %"))
    for name, text in (
        ("harmful", "answers to held-out harmful requests that the judge finds harmful, before and after"),
        ("refused_harmful", "held-out harmful requests refused, before and after"),
        ("refused_harmless", "held-out harmless requests refused, before and after"),
    ):
        before, after = stage.last(f"eval/safety/{name}_before"), stage.last(f"eval/safety/{name}_after")
        if before is not None and after is not None:
            facts.append((text, f"{100 * before:.1f} % → {100 * after:.1f} %"))
    return facts


def _targets(stages: Sequence[Stage]) -> list[Level]:
    targets = [stage.setting("rlhf", "target_kl") for stage in stages if stage.curve("rlhf/kl", "step")[0]]
    return [Level("target", float(target)) for target in dict.fromkeys(targets) if isinstance(target, int | float)]
