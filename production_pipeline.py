"""What `zenml pipeline run production_pipeline` imports: the name stands for the pipeline itself."""

import sys

from pipelines.production import production_pipeline
from pipelines.start import as_command

sys.modules[__name__] = as_command(production_pipeline)  # type: ignore[assignment]
