"""The step that aligns a trained model with preferences."""

from typing import Annotated

from zenml import step

from steps.caching import ALIGN, alignment_code
from steps.references import DataReference, StageReference
from steps.training_stage import train_stage
from ultrathink_model.workflow import StepPlan


@step(cache_policy=ALIGN)
def rlhf(plan: StepPlan, data: DataReference, initial: StageReference) -> Annotated[StageReference, "stage"]:
    """Trains a reward model and aligns a stage's model by it."""
    return train_stage(plan, data, alignment_code(), initial)
