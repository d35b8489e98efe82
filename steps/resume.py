"""The step that goes on with a trained model and more features."""

from typing import Annotated

from zenml import step

from steps.caching import TRAIN, training_code
from steps.references import DataReference, StageReference
from steps.training_stage import train_stage
from ultrathink_model.workflow import StepPlan


@step(cache_policy=TRAIN)
def resume(plan: StepPlan, data: DataReference, initial: StageReference) -> Annotated[StageReference, "stage"]:
    """Trains on from a stage's model, with the features that the plan's config turns on."""
    return train_stage(plan, data, training_code(), initial)
