"""The sections that shape the network: `model`, `advanced`, `moe` and `dre`."""

from typing import Literal

from pydantic import Field

from ultrathink_model.config.section import Section

FEED_FORWARD_MULTIPLE = 64
HARM_CATEGORIES = (
    "violence",
    "hate",
    "sexual",
    "self_harm",
    "pii",
    "deception",
    "illegal",
    "medical",
    "financial",
    "manipulation",
)


class ModelConfig(Section):
    """The dense decoder. With every feature off it is the Qwen3 architecture."""

    vocab_size: int = Field(100_352, ge=2, description="Rows of the embedding; at least the tokenizer's size.")
    hidden_size: int = Field(512, ge=8, description="Width of the residual stream.")
    num_layers: int = Field(6, ge=1, description="Number of decoder blocks.")
    num_heads: int = Field(8, ge=1, description="Query heads of each attention layer.")
    num_kv_heads: int | None = Field(
        None, ge=1, description="Key and value heads (grouped-query attention); null takes `num_heads`."
    )
    head_dim: int | None = Field(
        None, ge=2, description="Width of one head, even; null takes `hidden_size / num_heads`."
    )
    intermediate_size: int | None = Field(
        None,
        ge=1,
        description="Width of the SwiGLU feed-forward; null takes 8/3 of `hidden_size`, rounded up to 64.",
    )
    max_seq_length: int = Field(1024, ge=8, description="Tokens in one training sequence.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary position frequencies.")
    norm_eps: float = Field(1e-6, gt=0, description="Added to the mean square in RMSNorm.")
    tie_embeddings: bool = Field(True, description="Share the embedding with the output projection.")
    sliding_window: int | None = Field(
        None, ge=1, description="Tokens that a query may look back on, itself included; null looks back on all."
    )
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, about a third more time."
    )
    gradient_checkpointing_mode: Literal["whole", "selective"] = Field(
        "whole",
        description="What `gradient_checkpointing` recomputes: `whole` blocks, or all but matrix products and attention (`selective`: more memory, little more time).",
    )
    use_flash_attention: bool = Field(
        True, description="Let attention take the device's fused kernels; false takes the plain formula."
    )

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one head, resolved."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def feed_forward_size(self) -> int:
        """Width of the dense feed-forward, resolved."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * FEED_FORWARD_MULTIPLE)) * FEED_FORWARD_MULTIPLE


class AdvancedConfig(Section):
    """The switches of the features that stand on the dense decoder."""

    enable_moe: bool = Field(False, description="Replace feed-forwards by mixtures of experts (section `moe`).")
    enable_dre: bool = Field(False, description="Let a router choose each token's depth (section `dre`).")
    enable_constitutional: bool = Field(
        False, description="Give the model a head that scores ten kinds of harm (section `constitutional`)."
    )
    enable_rlhf: bool = Field(False, description="Run alignment (section `rlhf`) in place of pretraining.")
    enable_multimodal: bool = Field(False, description="Take images and sound beside text (section `multimodal`).")
    dre_warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps over which the reasoning engine goes from full compute to its budget."
    )

    @property
    def harm_categories(self) -> tuple[str, ...]:
        """What the harm head scores, in the order of its outputs; empty without it."""
        return HARM_CATEGORIES if self.enable_constitutional else ()


class MoEConfig(Section):
    """Mixture of experts: one router over all experts, of which four groups are ranges."""

    num_knowledge_experts: int = Field(32, ge=0, description="Experts of the knowledge group.")
    num_skill_experts: int = Field(16, ge=0, description="Experts of the skill group.")
    num_meta_experts: int = Field(8, ge=0, description="Experts of the meta group.")
    num_safety_experts: int = Field(4, ge=0, description="Experts of the safety group.")
    moe_top_k: int = Field(2, ge=1, description="Experts that each token is sent to.")
    layer_frequency: int = Field(
        1, ge=1, description="Every n-th block is a mixture: block i where (i + 1) is a multiple of n."
    )
    expert_hidden_size: int | None = Field(
        None, ge=1, description="Width of one expert; null takes the dense feed-forward's divided by `moe_top_k`."
    )
    expert_capacity: float | None = Field(
        None,
        gt=0,
        description="Most tokens an expert takes, in units of its fair share; later ones are dropped. Null drops none.",
    )
    load_balance_weight: float = Field(0.01, ge=0, description="Weight of the load-balance loss over the batch.")
    router_bias_rate: float = Field(
        0.0,
        ge=0,
        description="Balance without a loss: after each step a bias on an expert's logit, which only the choice sees, rises by this where the expert took less than its fair share and falls where it took more. With 0 there is no bias, and the model stays Qwen3-MoE's.",
    )
    router_z_loss_weight: float = Field(0.001, ge=0, description="Weight of the router's squared log-partition.")
    router_jitter: float = Field(
        0.0, ge=0, lt=1, description="In training the router's input is scaled by a uniform draw within 1 ± this."
    )
    group_loss_weight: float = Field(
        0.01, ge=0, description="Weight of the loss that pulls a tagged source's tokens to its expert group."
    )
    upcycle_noise: float = Field(
        0.0,
        ge=0,
        description="Noise on experts split from a dense model, in standard deviations of its weights; 0 keeps its function.",
    )

    @property
    def group_sizes(self) -> dict[str, int]:
        """Experts of each group, in the order of their ranges."""
        return {
            "knowledge": self.num_knowledge_experts,
            "skill": self.num_skill_experts,
            "meta": self.num_meta_experts,
            "safety": self.num_safety_experts,
        }

    @property
    def num_experts(self) -> int:
        """Experts in all groups together."""
        return sum(self.group_sizes.values())


ReasoningPath = Literal["fast", "standard", "deep", "ultra_deep"]


class DREConfig(Section):
    """Dynamic Reasoning Engine: how deep each token is processed in the routed blocks."""

    compute_budget: float = Field(
        0.6,
        gt=0,
        le=3,
        description="Passes of a routed block per token that training has room for after warm-up, as a mean; 1 is the dense model's compute.",
    )
    layer_frequency: int = Field(
        2, ge=1, description="Every n-th block is routed: block i where (i + 1) is a multiple of n."
    )
    dense_layers: int = Field(
        0,
        ge=0,
        description="First blocks that are never routed. A token that passes by every block can, with tied embeddings, predict little but itself.",
    )
    deep_share: float = Field(0.1, ge=0, le=1, description="Share of tokens that there is room for in a second pass.")
    ultra_deep_share: float = Field(
        0.05, ge=0, le=1, description="Share of tokens that there is room for in a third pass."
    )
    force_path: ReasoningPath | None = Field(
        None,
        description="Send every token along one path (fast, standard, deep, ultra_deep); null lets the router choose.",
    )

    def routes(self, layer: int) -> bool:
        """Whether block `layer` (0-based) is routed."""
        return layer >= self.dense_layers and (layer + 1) % self.layer_frequency == 0

    @property
    def standard_share(self) -> float:
        """Share of tokens with room in a first pass: the budget less what the further passes take."""
        return self.compute_budget - self.deep_share - self.ultra_deep_share
