"""The step that turns sources into token shards."""

from pathlib import Path
from typing import Annotated

from zenml import step
from zenml.types import HTMLString

from steps.caching import PREPARE_DATA
from steps.deployed import refuse_other_settings
from steps.references import DataReference, hash_files, publish
from ultrathink_model.data.card import CARD_NAME, PAGE_NAME
from ultrathink_model.data.manifest import MANIFEST_NAME
from ultrathink_model.data.prepare import prepare_data as prepare
from ultrathink_model.workflow import StepPlan

FILES = (MANIFEST_NAME, CARD_NAME)


@step(cache_policy=PREPARE_DATA)
def prepare_data(plan: StepPlan) -> tuple[Annotated[DataReference, "data"], Annotated[HTMLString, "dataset_card"]]:
    """Prepares the data of a stage's config, or finds them prepared; the data set card is shown on the dashboard."""
    refuse_other_settings()
    print(f"{plan.title}: {plan.config.data.mix_datasets or plan.config.data.dataset}", flush=True)
    manifest = prepare(plan.config)
    folder = Path(plan.config.data.cache_dir) / manifest.path.name
    reference = DataReference(
        **publish(plan, folder), files=FILES, sha256=hash_files(folder, FILES), fingerprint=manifest.fingerprint
    )
    return reference, HTMLString((folder / PAGE_NAME).read_text(encoding="utf-8"))
