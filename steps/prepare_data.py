"""The step that turns sources into token shards."""

from typing import Annotated

from zenml import step

from steps.caching import PREPARE_DATA
from steps.references import DataReference, hash_files
from ultrathink_model.data.manifest import MANIFEST_NAME
from ultrathink_model.data.prepare import prepare_data as prepare
from ultrathink_model.workflow import StepPlan


@step(cache_policy=PREPARE_DATA)
def prepare_data(plan: StepPlan) -> Annotated[DataReference, "data"]:
    """Prepares the data of a stage's config, or finds them prepared."""
    print(f"{plan.title}: {plan.config.data.mix_datasets or plan.config.data.dataset}", flush=True)
    manifest = prepare(plan.config)
    folder = manifest.path.resolve()
    return DataReference(
        uri=str(folder),
        files=(MANIFEST_NAME,),
        sha256=hash_files(folder, (MANIFEST_NAME,)),
        fingerprint=manifest.fingerprint,
    )
