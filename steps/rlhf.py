"""The step that aligns a trained model with preferences."""

from typing import Annotated

from zenml import step

from steps.caching import ALIGN, alignment_code
from steps.references import DataReference, StageReference
from steps.training_stage import train_stage
from ultrathink_model.config import override_config
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.workflow import StepPlan


@step(cache_policy=ALIGN)
def rlhf(plan: StepPlan, data: DataReference, initial: StageReference) -> Annotated[StageReference, "stage"]:
    """Trains a reward model and aligns a stage's model by it.

    After a constitutional stage the reward model learns from the choices of its critic, unless the config names other
    preferences.
    """
    labelled = RunFolder(initial.fetch().folder).preferences_file
    if labelled.exists() and plan.config.rlhf.preference_data is None:
        config = override_config(plan.config, [f"rlhf.preference_data={labelled}"])
        plan = plan.model_copy(update={"config": config})
    return train_stage(plan, data, alignment_code(), initial)
