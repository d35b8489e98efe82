"""The step that has a trained model criticise and revise its own answers."""

from typing import Annotated

from zenml import step

from steps.caching import ALIGN, alignment_code
from steps.references import DataReference, StageReference
from steps.training_stage import RESULT_FILES, train_stage
from ultrathink_model.workflow import StepPlan

# Every prompt, critique, revision and choice, and what the RLHF stage learns from.
KEPT_FILES = ("revisions.jsonl", "choices.jsonl", "preferences.jsonl")


@step(cache_policy=ALIGN)
def constitutional(plan: StepPlan, data: DataReference, initial: StageReference) -> Annotated[StageReference, "stage"]:
    """Tunes a stage's model on revisions of its answers, and labels preferences between its answers."""
    return train_stage(plan, data, alignment_code(), initial, files=(*RESULT_FILES, *KEPT_FILES))
