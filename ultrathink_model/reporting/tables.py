"""The tables of the report: the stages at a glance, their evaluation beside the baselines, samples, and config."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.reporting.curves import BASELINES
from ultrathink_model.reporting.quantities import NARROW_SPACE, duration, short
from ultrathink_model.reporting.stages import Stage

TASK = "eval/validation/"
TRAINING = ("train/", "rlhf/")
# Measure and decimals, in the order of the table's columns.
MEASURES = {"bits_per_byte": 3, "loss": 3, "perplexity": 1}


@dataclass(frozen=True)
class EvaluationRow:
    """One model of the evaluation table; `share` is its bits per byte in percent of the largest."""

    name: str
    stage: Stage | None
    values: list[str]
    share: float
    best: bool


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
    validation = _metric(stage, "loss") or stage.last("val/loss")
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
    evaluated = [stage for stage in stages if _metric(stage, "bits_per_byte") is not None]
    if not evaluated:
        return ""
    stage = evaluated[-1]
    bits = _metric(stage, "bits_per_byte")
    bigram = stage.evaluation.metrics.get("eval/bigram/bits_per_byte") if stage.evaluation else None
    sentence = f"{stage.name} needs {bits:.3f} bits for each byte of held-out text"
    if bits is None or bigram is None or not math.isfinite(bits):
        return sentence + "."
    difference = abs(bits - bigram)
    return f"{sentence}, {difference:.3f} {'fewer' if bits < bigram else 'more'} than a bigram model of the same data."


def evaluation_rows(stages: Sequence[Stage]) -> list[EvaluationRow]:
    """Every evaluated stage, and then the baselines, from the measures of the validation split."""
    models: list[tuple[str, Stage | None, list[float | None]]] = [
        (stage.name, stage, [_metric(stage, measure) for measure in MEASURES]) for stage in stages if stage.evaluation
    ]
    evaluations = [stage.evaluation for stage in stages if stage.evaluation]
    for name in BASELINES:
        if evaluations and f"eval/{name}/bits_per_byte" in evaluations[-1].metrics:
            values = [evaluations[-1].metrics.get(f"eval/{name}/{measure}") for measure in MEASURES]
            models.append((f"{name} model", None, values))
    bits = [values[0] for _, _, values in models if values[0] is not None and math.isfinite(values[0])]
    return [
        EvaluationRow(
            name,
            stage,
            [_shown(value, decimals) for value, decimals in zip(values, MEASURES.values(), strict=True)],
            share=100 * values[0] / max(bits) if values[0] in bits and values[0] is not None else 0.0,
            best=bool(bits) and values[0] == min(bits),
        )
        for name, stage, values in models
    ]


def other_measures(stages: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    """Metrics of evaluation that have no column of their own: a name, and a value for each evaluated stage."""
    evaluations = [stage.evaluation for stage in stages if stage.evaluation]
    own = {f"eval/{task}/{measure}" for task in ("validation", *BASELINES) for measure in MEASURES}
    names = dict.fromkeys(
        name
        for evaluation in evaluations
        for name in evaluation.metrics
        if name not in own and not name.startswith("eval/multimodal/")
    )
    return [(name, [_shown(evaluation.metrics.get(name)) for evaluation in evaluations]) for name in names]


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


def _metric(stage: Stage, measure: str) -> float | None:
    evaluation: EvaluationResult | None = stage.evaluation
    return evaluation.metrics.get(TASK + measure) if evaluation else None


def _shown(value: float | None, decimals: int = 3) -> str:
    if value is None:
        return "—"
    return f"{value:.{decimals}f}" if abs(value) < 1000 else short(value, 4)
