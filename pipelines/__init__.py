"""The workflows as ZenML pipelines: wiring only."""

# Importing the steps first sets up what must stand before ZenML is imported.
import steps  # noqa: F401
