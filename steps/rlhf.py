"""The step that aligns a trained model with preferences."""

from typing import Annotated

from zenml import step

from steps.caching import ALIGN, alignment_code
from steps.references import DataReference, StageReference
from steps.reward import with_labelled_preferences
from steps.training_stage import train_stage
from ultrathink_model.config import override_config
from ultrathink_model.workflow import StepPlan


@step(cache_policy=ALIGN)
def rlhf(
    plan: StepPlan, data: DataReference, initial: StageReference, rewards: StageReference | None = None
) -> Annotated[StageReference, "stage"]:
    """Aligns a stage's model by the reward model of another stage, or by the rewards that the config names."""
    if rewards is None:
        plan = with_labelled_preferences(plan, initial)
    else:
        config = override_config(plan.config, [f"rlhf.reward_run={rewards.fetch().folder}"])
        plan = plan.model_copy(update={"config": config})
    return train_stage(plan, data, alignment_code(), initial)
