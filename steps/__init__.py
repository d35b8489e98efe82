"""ZenML steps: each adapts one computation of the package, and passes small typed references, never weights.

Importing ZenML is what the settings below must come before. They hold for the process, and a setting of the user's
own wins.
"""

import os

os.environ.setdefault("ZENML_ANALYTICS_OPT_IN", "false")
# ZenML's coloured log lines are escape codes in a file; a terminal shows our own progress line.
os.environ.setdefault("ZENML_LOGGING_COLORS_DISABLED", "true")
