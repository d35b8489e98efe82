"""The section `promotion`: what puts a model into production."""

from pydantic import Field

from ultrathink_model.config.section import Section


class PromotionConfig(Section):
    """The gates before production, and the registry that says which model is there."""

    gates_file: str | None = Field(None, description="YAML file of gates; null takes `configs/gates.yaml`.")
    registered_model: str = Field(
        "ultrathink",
        min_length=1,
        pattern=r"^[^/:]+$",
        description="Name of the model in MLflow's registry, whose version with the alias `production` is the one in use.",
    )
