"""The report's facts and tables beside its measures: the stages at a glance, samples, and config."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ultrathink_model.reporting.measures import metric_of
from ultrathink_model.reporting.quantities import NARROW_SPACE, duration, short
from ultrathink_model.reporting.stages import Stage

TRAINING = ("train/", "rlhf/")


@dataclass(frozen=True)
class PromptSamples:
    """What each stage made of the same prompt."""

    prompt: str
    answers: list[tuple[Stage, str]]


def stage_facts(stage: Stage) -> list[tuple[str, str]]:
    """A stage at a glance: a name and a value each."""
    facts = []
    if stage.rows:
        facts.append(("steps", f"{int(stage.rows[-1].get('step', 0)):,}".replace(",", NARROW_SPACE)))
    tokens = stage.last("tokens")
    if tokens:
        facts.append(("tokens", short(tokens)))
    validation = metric_of(stage, "loss") or stage.last("val/loss")
    if validation is not None:
        facts.append(("held-out loss", f"{validation:.3f}"))
    speeds = stage.curve("train/tokens_per_second", "step")[1]
    if speeds:
        facts.append(("tokens per second", short(median(speeds))))
    # Evaluation adds a line of its own, perhaps hours later.
    times = [row["time"] for row in stage.rows if "time" in row and any(name.startswith(TRAINING) for name in row)]
    if len(times) > 1:
        facts.append(("time", duration(times[-1] - times[0])))
    return facts


def headline(stages: Sequence[Stage]) -> str:
    """The last evaluated stage against the bigram model, in one sentence; empty where neither was evaluated."""
    evaluated = [stage for stage in stages if metric_of(stage, "bits_per_byte") is not None]
    if not evaluated:
        return ""
    stage = evaluated[-1]
    bits = metric_of(stage, "bits_per_byte")
    bigram = stage.evaluation.metrics.get("eval/bigram/bits_per_byte") if stage.evaluation else None
    sentence = f"{stage.name} needs {bits:.3f} bits for each byte of held-out text"
    if bits is None or bigram is None or not math.isfinite(bits):
        return sentence + "."
    difference = abs(bits - bigram)
    return f"{sentence}, {difference:.3f} {'fewer' if bits < bigram else 'more'} than a bigram model of the same data."


def samples_by_prompt(stages: Sequence[Stage]) -> list[PromptSamples]:
    """The generated texts, those from one prompt together."""
    prompts: dict[str, list[tuple[Stage, str]]] = {}
    for stage in stages:
        for sample in stage.evaluation.samples if stage.evaluation else []:
            prompts.setdefault(sample.prompt, []).append((stage, sample.text))
    return [PromptSamples(prompt, answers) for prompt, answers in prompts.items()]


def config_differences(stages: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    """The keys whose values are not the same in all stages: a name, and a value for each stage."""
    flat = [
        {f"{section}.{key}": value for section, keys in stage.config.items() for key, value in keys.items()}
        for stage in stages
    ]
    names = dict.fromkeys(name for values in flat for name in values)
    rows = [(name, [str(values.get(name, "—")) for values in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name != "output.output_dir"]
