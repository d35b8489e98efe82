"""The step that trains a model from a seed."""

from typing import Annotated

from zenml import step

from steps.caching import TRAIN, training_code
from steps.references import DataReference, StageReference
from steps.training_stage import train_stage
from ultrathink_model.workflow import StepPlan


@step(cache_policy=TRAIN)
def pretrain(plan: StepPlan, data: DataReference) -> Annotated[StageReference, "stage"]:
    """Trains a model from a seed on next-token prediction."""
    return train_stage(plan, data, training_code())
