"""The step that trains a reward model on preference pairs."""

from typing import Annotated

from zenml import step

from steps.caching import ALIGN, alignment_code
from steps.references import DataReference, StageReference
from steps.training_stage import RESULT_FILES, train_stage
from ultrathink_model.config import override_config
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.workflow import StepPlan

PAIRS = ("pairs.jsonl",)


@step(cache_policy=ALIGN)
def reward(plan: StepPlan, data: DataReference, initial: StageReference) -> Annotated[StageReference, "stage"]:
    """Trains a reward model that starts from a stage's model; `final_model/` is the reward model."""
    plan = with_labelled_preferences(plan, initial)
    return train_stage(plan, data, alignment_code(), initial, files=(*RESULT_FILES, *PAIRS))


def with_labelled_preferences(plan: StepPlan, initial: StageReference) -> StepPlan:
    """The plan with the choices that a constitutional stage's critic made, unless the config names other preferences."""
    labelled = RunFolder(initial.fetch().folder).preferences_file
    if not labelled.exists() or plan.config.rlhf.preference_data is not None:
        return plan
    config = override_config(plan.config, [f"rlhf.preference_data={labelled}"])
    return plan.model_copy(update={"config": config})
