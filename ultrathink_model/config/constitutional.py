"""The section `constitutional`: the harm head, and Constitutional AI with its critic."""

from typing import Literal

from pydantic import Field, model_validator

from ultrathink_model.config.section import Section


class ConstitutionalConfig(Section):
    """The harm head (`advanced.enable_constitutional`), and Constitutional AI: critique, revision, AI preferences."""

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
    enabled: bool = Field(
        False,
        description="Run Constitutional AI on a trained model in place of pretraining; the production workflow does so in a stage of its own.",
    )
    constitution: str | None = Field(
        None, description="YAML file of principles; null takes `configs/constitution.yaml`."
    )
    red_team_data: str | None = Field(
        None, description="JSONL file of `prompt`; null takes the harmful ones among the built-in requests."
    )
    num_prompts: int = Field(64, ge=2, description="Most red-team prompts that are answered.")
    revisions: int = Field(1, ge=1, description="Times that an answer is criticised and revised.")
    response_tokens: int = Field(64, ge=1, description="Most tokens in an answer, a critique or a revision.")
    temperature: float = Field(0.8, gt=0, description="Sampling temperature of answers, critiques and revisions.")
    sft_epochs: int = Field(2, ge=1, description="Passes over the revisions when the model is tuned on them.")
    sft_batch_size: int = Field(16, ge=1, description="Revisions per optimizer step.")
    sft_learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of that tuning.")
    label_preferences: bool = Field(
        True,
        description="Have the critic choose between two answers to each prompt; RLHF learns from its choices unless `rlhf.preference_data` names others.",
    )
    critic: Literal["self", "local", "endpoint"] = Field(
        "self",
        description="Who criticises: the model itself, a `local` Hugging Face folder, or an OpenAI-compatible `endpoint`.",
    )
    critic_model: str | None = Field(
        None, description="The folder of the local critic, or the model's name at the endpoint."
    )
    critic_url: str | None = Field(None, description="Base address of the endpoint, as in `http://127.0.0.1:8000/v1`.")
    critic_key_variable: str = Field(
        "OPENAI_API_KEY",
        min_length=1,
        description="Environment variable that holds the endpoint's key; where it is not set, none is sent.",
    )
    critic_timeout_seconds: float = Field(60.0, gt=0, description="Seconds that one answer of the endpoint may take.")
    critic_retries: int = Field(3, ge=0, description="Times that a failed request is sent again.")
    critic_token_budget: int = Field(
        1_000_000, ge=1, description="Tokens, asked and answered, after which the endpoint is asked no more."
    )
    on_bad_answer: Literal["skip", "error"] = Field(
        "skip",
        description="What an empty or senseless answer, or an endpoint that does not answer, does: the prompt is skipped and counted, or the run ends.",
    )
    judge: Literal["harm_head", "classifier", "critic"] = Field(
        "harm_head",
        description="Who judges whether answers do harm, before and after an alignment: the harm head of the model that it began with, where it has one, a `classifier`, or the critic.",
    )
    judge_model: str | None = Field(
        None, description="The Hugging Face folder of the classifier that judges; its code is not run."
    )
    judge_label: str | None = Field(
        None, description="The classifier's label for what does harm; null takes its last one."
    )

    @model_validator(mode="after")
    def _judge_is_named(self) -> "ConstitutionalConfig":
        if (self.judge == "classifier") != (self.judge_model is not None):
            raise ValueError(
                f"constitutional.judge={self.judge} and constitutional.judge_model={self.judge_model!r}: a classifier "
                "needs its folder, and no other judge reads it; set both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _critic_is_named(self) -> "ConstitutionalConfig":
        if self.critic != "self" and self.critic_model is None:
            raise ValueError(
                f"constitutional.critic={self.critic} needs constitutional.critic_model; name its "
                f"{'folder' if self.critic == 'local' else 'model as the endpoint knows it'}"
            )
        if self.critic == "endpoint" and not (self.critic_url or "").startswith(("http://", "https://")):
            raise ValueError(
                f"constitutional.critic=endpoint needs constitutional.critic_url, and {self.critic_url!r} is no http "
                "address; give one such as http://127.0.0.1:8000/v1"
            )
        if "@" in (self.critic_url or ""):
            raise ValueError(
                "constitutional.critic_url holds a user or a password; secrets come from the environment: put a key in "
                f"the variable that constitutional.critic_key_variable names ({self.critic_key_variable})"
            )
        return self
