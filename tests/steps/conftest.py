"""A ZenML of the tests' own: nothing of the user's is read or written."""

import atexit
import os
import shutil
import tempfile

if "ULTRATHINK_TEST_ZENML" not in os.environ:
    # Before ZenML is imported, which happens when the test modules are collected.
    os.environ["ULTRATHINK_TEST_ZENML"] = tempfile.mkdtemp(prefix="ultrathink-zenml-")
    atexit.register(shutil.rmtree, os.environ["ULTRATHINK_TEST_ZENML"], ignore_errors=True)
os.environ["ZENML_CONFIG_PATH"] = os.environ["ULTRATHINK_TEST_ZENML"]
os.environ["ZENML_ANALYTICS_OPT_IN"] = "false"
