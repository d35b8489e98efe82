"""What `zenml pipeline run multi_gpu_pipeline` imports: the name stands for the pipeline itself."""

import sys

from pipelines.multi_gpu import multi_gpu_pipeline
from pipelines.start import as_command

sys.modules[__name__] = as_command(multi_gpu_pipeline)  # type: ignore[assignment]
