"""What `zenml pipeline run prototype_pipeline` imports: the name stands for the pipeline itself."""

import sys

from pipelines.prototype import prototype_pipeline
from pipelines.start import as_command

sys.modules[__name__] = as_command(prototype_pipeline)  # type: ignore[assignment]
