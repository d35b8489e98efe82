"""The section `constitutional`: the harm head and the labelled texts it learns from."""

from pydantic import Field

from ultrathink_model.config.section import Section


class ConstitutionalConfig(Section):
    """The harm head (`advanced.enable_constitutional`)."""

    safety_data: str | None = Field(
        None,
        description="JSONL file of `text` and `labels` (a list of harm categories, empty for a harmless text); null takes a small built-in set.",
    )
    holdout_fraction: float = Field(
        0.25, gt=0, lt=1, description="Share of the labelled texts that the harm head is measured on."
    )
    harm_token_fraction: float = Field(
        0.05, gt=0, le=1, description="Labelled tokens for each token of the corpus in a training step."
    )
    harm_loss_weight: float = Field(
        1.0, gt=0, description="Weight of the harm loss of a labelled token against the language loss of a token."
    )
