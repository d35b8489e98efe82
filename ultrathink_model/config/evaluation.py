"""The section `evaluation`: what is measured, when, and on how much."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ultrathink_model.config.gates import split_bound
from ultrathink_model.config.section import Section

Measure = Literal["calibration", "context", "blimp"]

# What a run that trains knows nothing of: it stays the same run, and what it came to valid, when these change.
FINAL_ONLY = ("speed_tokens", "tasks", "task_samples", "num_fewshot", "gates")
MEASURED = ("calibration_bins", "context_length", "context_samples", "blimp", "blimp_pairs")


class EvaluationConfig(Section):
    """What is measured, how often, and on how much."""

    eval_frequency: int = Field(1, ge=1, description="Epochs between validations; each also saves a checkpoint.")
    eval_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between validations; null leaves it to epochs."
    )
    eval_samples: int | None = Field(
        None, ge=1, description="Validation sequences used while training; null uses all. The last evaluation uses all."
    )
    batch_size: int = Field(16, ge=1, description="Sequences per device and evaluation step.")
    num_generations: int = Field(4, ge=0, description="Sample texts generated from held-out prompts.")
    media_questions: int = Field(
        200,
        ge=0,
        description="Held-out questions of each kind that are put to a model which learnt from `digits`; 0 asks none.",
    )
    sample_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between sample texts while training, in `samples.jsonl`; null writes none on the way.",
    )
    generation_tokens: int = Field(64, ge=1, description="Most tokens in one sample text.")
    temperature: float = Field(0.8, ge=0, description="Sampling temperature of the sample texts; 0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Probability mass that the sample texts are drawn from.")
    training_measures: list[Measure] = Field(
        [],
        description="Measures of the finished model that are taken at each validation while training, too, as `eval/*`.",
    )
    calibration_bins: int = Field(15, ge=2, description="Bins of confidence that the calibration error is taken over.")
    context_length: int | None = Field(
        None,
        ge=2,
        description="Tokens of context up to which the loss by position is measured; null takes `model.max_seq_length`. More shows what the model makes of positions that it has not been trained on.",
    )
    context_samples: int = Field(
        64, ge=0, description="Held-out windows that the loss by position is measured on; 0 measures none."
    )
    blimp: str | None = Field(None, description="Folder of BLiMP's JSONL files, one a paradigm; null leaves BLiMP out.")
    blimp_pairs: int | None = Field(
        None, ge=1, description="Minimal pairs taken of each of BLiMP's paradigms; null takes all."
    )
    speed_tokens: int = Field(
        32, ge=0, description="Tokens generated to time generation, for one text and for a batch; 0 times nothing."
    )
    tasks: list[str] = Field(
        [],
        description="Tasks of lm-eval that a finished model is given: names of its own (most need the network), YAML files, folders of them, or JSONL files of questions; needs the extra `evaluation`.",
    )
    task_samples: int | None = Field(None, ge=1, description="Documents taken of each task; null takes all.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Solved examples before each question of a task; null leaves it to the task."
    )
    gates: dict[str, str] = Field(
        {},
        description="Bounds on metrics of the last evaluation or of the run, as in `{eval/safety/caught: '>= 0.9'}`; a model that does not keep them ends the run with exit code 3.",
    )

    @field_validator("gates")
    @classmethod
    def _gates_are_bounds(cls, gates: dict[str, str]) -> dict[str, str]:
        for bound in gates.values():
            split_bound(bound)
        return gates

    @field_validator("training_measures")
    @classmethod
    def _measures_are_named_once(cls, measures: list[Measure]) -> list[Measure]:
        return list(dict.fromkeys(measures))

    @model_validator(mode="after")
    def _blimp_has_its_folder(self) -> "EvaluationConfig":
        if "blimp" in self.training_measures and self.blimp is None:
            raise ValueError("training_measures names blimp, and evaluation.blimp is null; name BLiMP's folder there")
        return self

    def while_training(self) -> "EvaluationConfig":
        """The section as training sees it: keys that only the finished model's evaluation reads take their defaults."""
        unread = FINAL_ONLY if self.training_measures else (*FINAL_ONLY, *MEASURED)
        return self.model_copy(update={name: getattr(EvaluationConfig(), name) for name in unread})
