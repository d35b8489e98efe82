"""Memory of one rank in training, by part, in bytes."""

from dataclasses import dataclass

from ultrathink_model.config import Config
from ultrathink_model.planning.media import media_activations
from ultrathink_model.planning.parameters import (
    Parameters,
    count_parameters,
    expert_width,
    frozen_parameters,
    media_parameters,
    num_mixtures,
)

FP32 = 4
HALF = 2
# AdamW keeps two numbers a weight, Muon one.
ADAMW_BYTES, MUON_BYTES = 8, 4
# Attention on a processor works in blocks of so many queries, in float32 up to this length: `models/blocked_attention.py`.
BLOCK, LONGEST = 64, 512


@dataclass(frozen=True)
class Memory:
    """What one rank holds at the peak of a training step.

    Attributes:
        parts: Bytes on the device by the name of the part.
        host: Bytes in host memory beside them, where state is offloaded.
        activations: Bytes of activations with and without gradient checkpointing, by `"whole"` and `"none"`.
    """

    parts: dict[str, float]
    host: float
    activations: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Sharding:
    """How a strategy cuts state over its ranks: the share of each kind that one rank holds.

    Attributes:
        weights: Share of the weights, 0 to 1.
        gradients: Share of the gradients.
        optimizer: Share of the optimizer's state.
        gathered_blocks: Blocks whose whole weights are gathered at once.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered_blocks: int = 0


def sharding(strategy: str, zero_stage: int, ranks: int) -> Sharding:
    """The shares under a strategy, `single`, `ddp`, `fsdp` or `deepspeed`."""
    part = 1 / ranks
    if strategy == "fsdp":
        return Sharding(part, part, part, gathered_blocks=2)
    if strategy == "deepspeed":
        # Stages 1 and 2 keep flat copies of a rank's part of the weights beside the whole ones.
        return {
            1: Sharding(1 + part, 1, part),
            2: Sharding(1 + part, part, part),
            3: Sharding(part, part, part, gathered_blocks=2),
        }[zero_stage]
    return Sharding(1, 1, 1)


def training_memory(config: Config, strategy: str, ranks: int) -> Memory:
    """The peak of one training step, in which either the forward pass ends or the optimizer is about to move.

    At the end of the forward pass the activations, the logits of a chunk and the gradients that the cross-entropy has
    made stand beside weights and optimizer state; before the optimizer moves, all gradients do. With accumulation
    the gradients of the earlier micro-steps stand beside the activations, too. With images, the sequences are taken to
    be full of them.
    """
    tensor_ranks = config.distributed.tensor_parallel_size
    ranks = ranks // tensor_ranks
    parameters, shares = count_parameters(config), sharding(strategy, config.distributed.zero_stage, ranks)
    matrices = sum(parameters.parts.get(name, 0) for name in ("attention", "feed-forward"))
    held = parameters.total - matrices * (1 - 1 / tensor_ranks)
    held -= parameters.experts * (1 - 1 / config.distributed.expert_parallel_size)
    trained = held - frozen_parameters(config)
    decoder = parameters.total - sum(media_parameters(config).values())
    blocks = decoder - parameters.parts["embedding"] - matrices * (1 - 1 / tensor_ranks)
    largest_block = blocks / config.model.num_layers
    optimizer = trained * shares.optimizer * _optimizer_bytes(config, parameters)
    offloaded = config.distributed.cpu_offload
    gradients = trained * shares.gradients * FP32
    projection = config.model.vocab_size * config.model.hidden_size * FP32
    saved = {mode: _activations(config, mode) for mode in ("none", "whole")}
    # What `selective` keeps lies between the two: the plan takes the larger.
    recomputes = config.model.gradient_checkpointing and config.model.gradient_checkpointing_mode == "whole"
    activations = saved["whole" if recomputes else "none"]
    accumulates = _accumulates(config, ranks)
    # The backward pass begins with all activations, and works through the last block, which it may compute again.
    last_block = _working_bytes(config) + (max(_blocks(config)) if recomputes else 0)
    working = projection + max(_loss_buffers(config), _micro_batch_tokens(config) * last_block)
    media = media_activations(config)
    forward = activations + media + working + (gradients if accumulates else 0)
    backward = gradients + projection
    parts = {
        "weights": held * shares.weights * FP32 + shares.gathered_blocks * largest_block * FP32,
        "optimizer": 0.0 if offloaded else optimizer,
        "gradients": gradients if accumulates or backward > forward else 0.0,
        "activations": activations if forward >= backward else 0.0,
        "activations of images": media if forward >= backward else 0.0,
        "logits and working memory": working if forward >= backward else projection,
    }
    if config.training.use_amp:
        # The backward pass needs them, unless it makes them again.
        again = shares.gathered_blocks and recomputes
        parts["weights in 16 bits"] = (largest_block if again else held) * HALF
    if config.training.ema_decay is not None:
        parts["averaged weights"] = held * shares.weights * FP32
    return Memory({name: size for name, size in parts.items() if size}, optimizer if offloaded else 0.0, saved)


def checkpoint_bytes(config: Config) -> float:
    """Size of one checkpoint: weights and optimizer state."""
    parameters = count_parameters(config)
    trained = parameters.total - frozen_parameters(config)
    return parameters.total * FP32 + trained * _optimizer_bytes(config, parameters)


def _optimizer_bytes(config: Config, parameters: Parameters) -> float:
    """Bytes of optimizer state a weight, in the mean."""
    if config.training.optimizer == "adamw":
        return ADAMW_BYTES
    names = ("attention", "feed-forward", "experts", "image encoder", "audio encoder")
    moved = sum(parameters.parts.get(name, 0) for name in names) / parameters.total
    return moved * MUON_BYTES + (1 - moved) * ADAMW_BYTES


def _accumulates(config: Config, ranks: int) -> bool:
    training = config.training
    if training.global_batch_size is not None:
        return training.global_batch_size > training.batch_size * ranks
    return training.gradient_accumulation_steps > 1


def _loss_buffers(config: Config) -> float:
    """Logits of one chunk of tokens: in float32, and in 16 bits before and after under mixed precision."""
    tokens = min(config.training.loss_chunk_size, _micro_batch_tokens(config))
    return tokens * config.model.vocab_size * (FP32 + (2 * HALF if config.training.use_amp else 0))


def _micro_batch_tokens(config: Config) -> int:
    return config.training.batch_size * config.model.max_seq_length


def _activations(config: Config, mode: str) -> float:
    """What is kept of one micro-batch from the forward pass to the backward pass; `whole` keeps the blocks' inputs."""
    tokens, layers = _micro_batch_tokens(config), config.model.num_layers
    stream = tokens * config.model.hidden_size * FP32
    return 2 * stream + (layers * stream if mode == "whole" else tokens * sum(_blocks(config)))


def _blocks(config: Config) -> list[float]:
    """What each block keeps of one token."""
    mixtures = num_mixtures(config)
    dense = [_block_bytes(config, mixture=False)] * (config.model.num_layers - mixtures)
    return dense + [_block_bytes(config, mixture=True)] * mixtures


def _working_bytes(config: Config) -> float:
    """What the gradient of one token through the gated feed-forward takes while it is made.

    The gradient that arrives, the gate's activation, a product and the gradients of gate and up are five widths, beside
    which what the last product kept is free again; where experts' outputs are weighted, there is one more.
    """
    mixtures = num_mixtures(config)
    units = config.model.feed_forward_size / config.distributed.tensor_parallel_size
    dense = 4 * units if mixtures < config.model.num_layers else 0
    mixture = 5 * expert_width(config) * config.moe.moe_top_k if mixtures else 0
    return max(dense, mixture) * (HALF if config.training.use_amp else FP32)


def _mixing_bytes(config: Config, queries: int, keys: int) -> float:
    """What attention keeps of one token beside its operands and its result.

    A fused kernel has the result in another order of heads. What computes plainly, or in blocks on a processor, keeps
    the weights of the tokens that each looks at. On a GPU float32 has the fused kernel, too, and needs less than this.
    """
    model, length = config.model, config.model.max_seq_length
    product = HALF if config.training.use_amp else FP32
    if not model.use_flash_attention:
        return (queries + model.num_heads * length) * product
    if config.training.use_amp or length > LONGEST:
        return queries * product
    ends = [min(start + BLOCK, length) for start in range(0, length, BLOCK)]
    seen = sum((end - start) * end for start, end in zip(range(0, length, BLOCK), ends, strict=True)) / length
    return (keys + model.num_heads * seen) * product


def _block_bytes(config: Config, *, mixture: bool) -> float:
    """What one block keeps of one token: the operands of its products, norms and attention, each once."""
    model, tensor_ranks = config.model, config.distributed.tensor_parallel_size
    product = HALF if config.training.use_amp else FP32
    hidden, queries, keys = model.hidden_size, model.num_heads * model.head_size, model.kv_heads * model.head_size
    normed = 2 * hidden * product
    residual = 2 * hidden * FP32
    attention = ((queries + 2 * keys) + queries + keys + queries) * product + _mixing_bytes(config, queries, keys)
    if mixture:
        width, top_k = expert_width(config), config.moe.moe_top_k
        inner: float = top_k * (hidden + 3 * width) * product + 3 * config.moe.num_experts * FP32
    else:
        inner = 3 * model.feed_forward_size / tensor_ranks * product
    return normed + residual + attention / tensor_ranks + inner
