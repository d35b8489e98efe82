"""The section `rlhf`: alignment by human, recorded or self-play preferences."""

from typing import Literal

from pydantic import Field, model_validator

from ultrathink_model.config.section import Section


class RewardSource(Section):
    """One of several rewards, whose weighted sum the policy learns from."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="Name of its metric, `rlhf/reward/<name>`.")
    kind: Literal["preferences", "model", "classifier", "callable"] = Field(
        description="`preferences`: a reward model trained here on the preference pairs; `model`: a `reward_model/` folder of an earlier run; `classifier`: a Hugging Face sequence-classification folder; `callable`: a Python function.",
    )
    source: str | None = Field(
        None,
        description="The folder, or the function as `module:function`; it takes the prompts and the responses, two lists of texts, and returns a number for each.",
    )
    label: str | None = Field(
        None, description="Label whose log-odds are a classifier's reward; null takes its last label."
    )
    weight: float = Field(1.0, description="Factor of this reward in the sum; below 0 it is a penalty.")

    @model_validator(mode="after")
    def _source_is_named(self) -> "RewardSource":
        if (self.kind == "preferences") != (self.source is None):
            raise ValueError(
                f"rlhf.rewards: {self.name} of kind {self.kind} "
                + ("is trained here and takes no source" if self.source else "needs a source")
            )
        return self


class RLHFConfig(Section):
    """Reward model and policy optimisation."""

    algorithm: Literal["ppo", "grpo", "dpo"] = Field("ppo", description="How the policy learns from preferences.")
    preference_data: str | None = Field(
        None,
        description="JSONL file of `prompt`, `chosen`, `rejected`; null makes pairs by self-play: the human continuation against the model's own.",
    )
    num_pairs: int = Field(512, ge=8, description="Pairs made by self-play.")
    holdout_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of prompts held out to measure the reward model."
    )
    prompt_tokens: int = Field(32, ge=1, description="Tokens of a prompt taken from the corpus.")
    response_tokens: int = Field(32, ge=1, description="Most tokens in one response.")
    reward_pooling: Literal["mean", "last"] = Field(
        "mean",
        description="A response's reward is the `mean` of the head's numbers at its tokens, or the one at its `last` token.",
    )
    reward_epochs: int = Field(2, ge=1, description="Passes of the reward model over the training pairs.")
    reward_learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of the reward model.")
    reward_batch_size: int = Field(32, ge=1, description="Pairs per optimizer step of the reward model.")
    reward_weighting: Literal["pair", "prompt"] = Field(
        "pair",
        description="What counts alike in the reward model's loss: every `pair`, or every `prompt` however many pairs it has.",
    )
    only_reward_model: bool = Field(
        False, description="End after the reward model, which is then the run's `final_model/`; no policy is trained."
    )
    reward_run: str | None = Field(
        None,
        description="Folder of a run that ended after its reward model (`only_reward_model`): its pairs and its reward model are taken, and none are made.",
    )
    rewards: list[RewardSource] | None = Field(
        None, description="Rewards that are added up; null takes the reward model of the preference pairs alone."
    )
    on_bad_reward: Literal["error", "skip"] = Field(
        "error",
        description="What a reward that is not finite, or a callable that raises, does: the run ends, or the response takes the mean of its batch and is counted.",
    )
    rlhf_iterations: int = Field(100, ge=1, description="Rounds of rollout and optimisation.")
    rlhf_steps_per_iteration: int = Field(
        1, ge=1, description="Batches of `ppo_batch_size` rollouts gathered in one round."
    )
    rlhf_frequency: int = Field(
        5, ge=1, description="Rounds between two language-model updates that guard against forgetting (PPO-ptx)."
    )
    ptx_weight: float = Field(
        1.0, ge=0, description="Weight of the language-model loss in those updates; 0 makes none."
    )
    ppo_epochs: int = Field(4, ge=1, description="Passes over the rollouts of one round.")
    ppo_batch_size: int = Field(32, ge=1, description="Rollouts in one batch.")
    ppo_minibatch_size: int = Field(16, ge=1, description="Rollouts per optimizer step.")
    policy_learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of the policy; null takes `training.learning_rate`."
    )
    value_learning_rate: float = Field(
        1e-3, gt=0, description="Learning rate of the value head under `algorithm: ppo`."
    )
    clip_range: float = Field(0.2, gt=0, lt=1, description="Bound on the policy's probability ratio.")
    value_clip_range: float = Field(0.2, gt=0, description="Bound on the change of a value estimate.")
    value_weight: float = Field(0.5, ge=0, description="Weight of the value loss.")
    entropy_weight: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of later rewards.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Bias against variance in the advantages.")
    whiten_advantages: bool = Field(True, description="Give the advantages of a round zero mean and unit variance.")
    kl_weight: float = Field(0.05, ge=0, description="First weight of the KL penalty against the frozen reference.")
    adaptive_kl: bool = Field(True, description="Move the KL weight so that the KL stays near `target_kl`.")
    target_kl: float = Field(
        6.0, gt=0, description="KL to the reference in nats per response that the run stays under."
    )
    kl_horizon: int = Field(1000, ge=1, description="Rollouts over which the KL weight adapts.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    top_p: float = Field(1.0, gt=0, le=1, description="Probability mass that the rollouts are drawn from.")
    group_size: int = Field(8, ge=2, description="Responses per prompt under `algorithm: grpo`.")
    dpo_beta: float = Field(0.1, gt=0, description="Strength of the reference under `algorithm: dpo`.")

    @model_validator(mode="after")
    def _rewards_have_names_of_their_own(self) -> "RLHFConfig":
        names = [reward.name for reward in self.rewards or []]
        if self.rewards is not None and (not names or len(set(names)) < len(names)):
            raise ValueError(
                f"rlhf.rewards names {', '.join(names) or 'nothing'}; it needs one or more, each with a name of its own"
            )
        return self

    @property
    def needs_reward_model(self) -> bool:
        """Whether a reward model of the preference pairs is among the rewards."""
        return self.rewards is None or any(reward.kind == "preferences" for reward in self.rewards)

    @model_validator(mode="after")
    def _reward_model_is_wanted(self) -> "RLHFConfig":
        if self.only_reward_model and self.reward_run is not None:
            raise ValueError(
                f"rlhf.only_reward_model=true trains a reward model, and rlhf.reward_run={self.reward_run} takes one that "
                "is there; set one of them"
            )
        if self.only_reward_model and not self.needs_reward_model:
            raise ValueError(
                "rlhf.only_reward_model=true, but rlhf.rewards names no reward of kind preferences, so that nothing "
                "would be trained; add one, or set it to false"
            )
        return self

    @model_validator(mode="after")
    def _adaptive_weight_can_move(self) -> "RLHFConfig":
        if self.adaptive_kl and self.kl_weight == 0:
            raise ValueError(
                "rlhf.adaptive_kl=true multiplies rlhf.kl_weight, and 0 stays 0; give a weight above 0, or set "
                "rlhf.adaptive_kl=false"
            )
        return self
