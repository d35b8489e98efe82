"""The whole config, and the rules that hold between its sections."""

from pydantic import Field, model_validator

from ultrathink_model.config.cleaning import CleaningConfig
from ultrathink_model.config.constitutional import ConstitutionalConfig
from ultrathink_model.config.data import DataConfig
from ultrathink_model.config.evaluation import EvaluationConfig
from ultrathink_model.config.export import ExportConfig
from ultrathink_model.config.model import AdvancedConfig, DREConfig, ModelConfig, MoEConfig
from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.config.promotion import PromotionConfig
from ultrathink_model.config.rlhf import RLHFConfig
from ultrathink_model.config.section import Section
from ultrathink_model.config.training import (
    DistributedConfig,
    LoggingConfig,
    OutputConfig,
    TrainingConfig,
)


class Config(Section):
    """One run: every section of the YAML."""

    model: ModelConfig = Field(ModelConfig(), description="The dense decoder.")
    advanced: AdvancedConfig = Field(AdvancedConfig(), description="Switches of the advanced features.")
    moe: MoEConfig = Field(MoEConfig(), description="Mixture of experts.")
    dre: DREConfig = Field(DREConfig(), description="Dynamic Reasoning Engine.")
    rlhf: RLHFConfig = Field(RLHFConfig(), description="Alignment.")
    constitutional: ConstitutionalConfig = Field(ConstitutionalConfig(), description="Harm head.")
    multimodal: MultimodalConfig = Field(MultimodalConfig(), description="Images and sound.")
    training: TrainingConfig = Field(TrainingConfig(), description="The training loop.")
    distributed: DistributedConfig = Field(DistributedConfig(), description="Ranks and strategies.")
    data: DataConfig = Field(DataConfig(), description="Sources, tokenizer and loader.")
    cleaning: CleaningConfig = Field(
        CleaningConfig(), description="What is mended, masked and removed before tokenizing."
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="What is measured, and when.")
    promotion: PromotionConfig = Field(PromotionConfig(), description="What puts a model into production.")
    logging: LoggingConfig = Field(LoggingConfig(), description="Metrics and messages.")
    output: OutputConfig = Field(OutputConfig(), description="Where the run writes.")
    export: ExportConfig = Field(ExportConfig(), description="What the export holds.")

    @model_validator(mode="after")
    def _heads_fit_the_width(self) -> "Config":
        model = self.model
        if model.head_dim is None and model.hidden_size % model.num_heads:
            raise ValueError(
                f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}; "
                "change one of them, or set model.head_dim"
            )
        if model.head_size % 2:
            raise ValueError(
                f"model.head_dim={model.head_size} is odd; rotary positions turn pairs: take an even width"
            )
        if model.num_heads % model.kv_heads:
            raise ValueError(
                f"model.num_kv_heads={model.kv_heads} does not divide model.num_heads={model.num_heads}; "
                "each key and value head serves a whole number of query heads"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_chosen(self) -> "Config":
        if not self.advanced.enable_moe:
            return self
        if self.moe.moe_top_k > self.moe.num_experts:
            raise ValueError(
                f"moe.moe_top_k={self.moe.moe_top_k} is more than the {self.moe.num_experts} experts of all groups; "
                "lower it or add experts"
            )
        if self.moe.layer_frequency > self.model.num_layers:
            raise ValueError(
                f"moe.layer_frequency={self.moe.layer_frequency} is more than model.num_layers={self.model.num_layers}: "
                "no block would be a mixture; lower it"
            )
        if self.moe.expert_hidden_size is None and self.model.feed_forward_size % self.moe.moe_top_k:
            raise ValueError(
                f"the feed-forward's {self.model.feed_forward_size} units do not split over moe.moe_top_k={self.moe.moe_top_k} "
                "experts; set moe.expert_hidden_size"
            )
        sources = self.data.mix_datasets if isinstance(self.data.mix_datasets, list) else []
        for source in sources:
            if source.expert_group and not self.moe.group_sizes[source.expert_group]:
                raise ValueError(
                    f"data.mix_datasets: the source {source.dataset!r} has expert_group={source.expert_group}, "
                    f"but moe.num_{source.expert_group}_experts=0; add experts there or name another group"
                )
        return self

    @model_validator(mode="after")
    def _depths_fit_the_budget(self) -> "Config":
        dre = self.dre
        if not self.advanced.enable_dre:
            return self
        if not any(dre.routes(layer) for layer in range(self.model.num_layers)):
            raise ValueError(
                f"dre.layer_frequency={dre.layer_frequency} and dre.dense_layers={dre.dense_layers} with "
                f"model.num_layers={self.model.num_layers}: no block would be routed; lower them"
            )
        if not dre.ultra_deep_share <= dre.deep_share <= dre.standard_share <= 1:
            raise ValueError(
                f"dre.compute_budget={dre.compute_budget} less deep_share={dre.deep_share} and "
                f"ultra_deep_share={dre.ultra_deep_share} leaves {dre.standard_share:g} of the tokens a first pass; "
                "the shares must fall with depth, from at most 1: ultra_deep <= deep <= standard"
            )
        return self

    @model_validator(mode="after")
    def _media_fit_the_sequence(self) -> "Config":
        if not self.advanced.enable_multimodal:
            return self
        media, length = self.multimodal, self.model.max_seq_length
        image, sound = media.image_grid**2, media.longest_audio_tokens
        if image >= length:
            raise ValueError(
                f"multimodal.image_size={media.image_size} at patch_size={media.patch_size} makes {media.image_grid}² = "
                f"{image} tokens an image, and model.max_seq_length={length} must hold text behind it; lower image_size, "
                "or raise patch_size or max_seq_length"
            )
        if sound >= length:
            raise ValueError(
                f"multimodal.max_audio_seconds={media.max_audio_seconds:g} makes {sound} tokens a sound, and "
                f"model.max_seq_length={length} must hold text behind it; lower max_audio_seconds, or raise "
                "audio_stack or max_seq_length"
            )
        return self

    @model_validator(mode="after")
    def _one_stage_at_a_time(self) -> "Config":
        section = self.constitutional
        if section.enabled and self.advanced.enable_rlhf:
            raise ValueError(
                "constitutional.enabled=true and advanced.enable_rlhf=true are two stages; run one after the other, "
                "each with --init-from the one before (the production workflow does)"
            )
        if section.enabled and 2 * section.response_tokens >= self.model.max_seq_length:
            raise ValueError(
                f"constitutional.response_tokens={section.response_tokens} leaves no room for an answer and its critique in "
                f"model.max_seq_length={self.model.max_seq_length}; keep it under half of that"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_fill_the_batch(self) -> "Config":
        rlhf = self.rlhf
        if rlhf.ppo_batch_size % rlhf.ppo_minibatch_size:
            raise ValueError(
                f"rlhf.ppo_minibatch_size={rlhf.ppo_minibatch_size} does not divide rlhf.ppo_batch_size={rlhf.ppo_batch_size}"
            )
        if rlhf.algorithm == "grpo" and rlhf.ppo_batch_size % rlhf.group_size:
            raise ValueError(
                f"rlhf.group_size={rlhf.group_size} does not divide rlhf.ppo_batch_size={rlhf.ppo_batch_size}; "
                "a batch holds whole groups"
            )
        if self.advanced.enable_rlhf and rlhf.prompt_tokens + rlhf.response_tokens > self.model.max_seq_length:
            raise ValueError(
                f"rlhf.prompt_tokens={rlhf.prompt_tokens} and rlhf.response_tokens={rlhf.response_tokens} together pass "
                f"model.max_seq_length={self.model.max_seq_length}"
            )
        return self

    @model_validator(mode="after")
    def _sequences_grow_by_doubling(self) -> "Config":
        first, steps, full = self.training.first_seq_length, self.training.seq_length_steps, self.model.max_seq_length
        if (first is None) != (steps == 0):
            raise ValueError(
                f"training.first_seq_length={first} and training.seq_length_steps={steps} go together; set both, or "
                "neither"
            )
        if first is not None and (full % first or (full // first).bit_count() != 1 or full == first):
            fits = [str(full >> halvings) for halvings in (1, 2, 3) if full % (1 << halvings) == 0]
            raise ValueError(
                f"training.first_seq_length={first} does not reach model.max_seq_length={full} by doubling; take "
                f"{', '.join(fits) or 'another max_seq_length'}"
            )
        return self

    @model_validator(mode="after")
    def _cleaning_sees_text_alone(self) -> "Config":
        if self.advanced.enable_multimodal and self.cleaning.enabled:
            raise ValueError(
                "the section `cleaning` judges and compares texts without their images and sounds, and cannot be used with "
                "advanced.enable_multimodal=true; clean the texts first, or switch its parts off"
            )
        return self

    @model_validator(mode="after")
    def _profiled_steps_are_in_order(self) -> "Config":
        steps = self.logging.profile_steps
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"logging.profile_steps={steps} must be [first, last] with 1 <= first <= last")
        return self

    @model_validator(mode="after")
    def _slurm_knows_its_partition(self) -> "Config":
        if self.data.executor == "slurm" and not self.data.slurm_partition:
            raise ValueError("data.executor=slurm needs data.slurm_partition; name the partition that cleaning runs on")
        return self

    @model_validator(mode="after")
    def _strategy_has_ranks(self) -> "Config":
        distributed = self.distributed
        if not distributed.enabled and distributed.strategy not in (None, "single"):
            raise ValueError(f"distributed.strategy={distributed.strategy} needs distributed.enabled=true")
        if distributed.deepspeed_config and distributed.strategy not in (None, "deepspeed"):
            raise ValueError(
                f"distributed.deepspeed_config is read only by strategy deepspeed, not {distributed.strategy}"
            )
        return self

    def _require_ddp_or_fsdp(self, start: str) -> None:
        distributed = self.distributed
        if distributed.strategy in ("ddp", "fsdp"):
            return
        if distributed.strategy is not None or distributed.deepspeed_config or distributed.launcher == "deepspeed":
            given = next(
                f"distributed.{key}={getattr(distributed, key)}"
                for key in ("strategy", "deepspeed_config", "launcher")
                if getattr(distributed, key) is not None
            )
            raise ValueError(f"{start} needs distributed.strategy ddp or fsdp, and {given} is another")

    @model_validator(mode="after")
    def _experts_can_be_cut(self) -> "Config":
        size = self.distributed.expert_parallel_size
        if size == 1:
            return self
        start = f"distributed.expert_parallel_size={size}"
        if not (self.advanced.enable_moe and self.distributed.enabled):
            raise ValueError(f"{start} cuts experts over ranks: it needs advanced.enable_moe and distributed.enabled")
        self._require_ddp_or_fsdp(start)
        if self.moe.num_experts % size:
            raise ValueError(
                f"{start} does not divide the {self.moe.num_experts} experts of all groups; change a group's size"
            )
        if self.advanced.enable_rlhf:
            raise ValueError(f"{start} is not available to alignment, whose rollouts end at other steps on each rank")
        mixtures = range(self.moe.layer_frequency, self.model.num_layers + 1, self.moe.layer_frequency)
        shared = next((block for block in mixtures if self.dre.routes(block - 1)), None)
        if self.advanced.enable_dre and shared is not None:
            raise ValueError(
                f"{start} cannot cut the mixture of block {shared}, which is routed in depth too: in evaluation its "
                "ranks would make different numbers of passes and wait for each other; change dre.layer_frequency"
            )
        return self

    @model_validator(mode="after")
    def _matrices_can_be_cut(self) -> "Config":
        size, model = self.distributed.tensor_parallel_size, self.model
        if size == 1:
            return self
        start = f"distributed.tensor_parallel_size={size}"
        if not self.distributed.enabled:
            raise ValueError(f"{start} cuts matrices over ranks: it needs distributed.enabled=true")
        self._require_ddp_or_fsdp(start)
        if (self.distributed.num_processes or size) % size:
            raise ValueError(
                f"{start} does not divide distributed.num_processes={self.distributed.num_processes}; take a divisor, or "
                "another number of processes"
            )
        if self.distributed.cpu_offload:
            raise ValueError(f"{start} keeps weights on the device; set distributed.cpu_offload=false")
        if model.kv_heads % size:
            raise ValueError(
                f"{start} does not divide model.num_kv_heads={model.kv_heads}: each rank holds whole groups of heads; "
                "take a divisor, or change the heads"
            )
        if model.feed_forward_size % size:
            raise ValueError(
                f"{start} does not divide the feed-forward's {model.feed_forward_size} units; take a divisor, or set "
                "model.intermediate_size"
            )
        if self.training.optimizer == "muon":
            raise ValueError(
                f"{start} cuts matrices that training.optimizer=muon moves whole; take training.optimizer=adamw"
            )
        if self.distributed.expert_parallel_size > 1:
            raise ValueError(
                f"{start} and distributed.expert_parallel_size={self.distributed.expert_parallel_size} cannot be used "
                "together; set one of them to 1"
            )
        if self.advanced.enable_rlhf:
            raise ValueError(
                f"{start} is not available to alignment, whose ranks draw answers of their own; set it to 1"
            )
        return self
