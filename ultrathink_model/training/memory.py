"""Running out of memory, told as what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.strategy import strategy_name
from ultrathink_model.errors import UltrathinkError

# What torch says of a failed allocation in host memory, for which it has no class of its own.
HOST_MESSAGE = "can't allocate memory"
LARGE_LOGITS_BYTES = 256 << 20


class OutOfMemoryError(UltrathinkError):
    """A run that needs more memory than its device has."""


@contextmanager
def explained_memory(config: Config, context: RankContext) -> Iterator[None]:
    """Turns a failed allocation into the remedies that fit the config.

    Raises:
        OutOfMemoryError: An allocation failed in the block.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and HOST_MESSAGE not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise OutOfMemoryError(
            f"rank {context.rank} ran out of memory on {context.device}{_use(context.device)}: {reason} "
            f"Any of these lowers it: {'; '.join(memory_remedies(config))}."
        ) from None


def memory_remedies(config: Config) -> list[str]:
    """Changes to a config that lower its memory, the cheapest first."""
    training, model = config.training, config.model
    remedies = []
    logits_bytes = 4 * training.loss_chunk_size * model.vocab_size
    if logits_bytes > LARGE_LOGITS_BYTES:
        fewer = max(1, LARGE_LOGITS_BYTES // (4 * model.vocab_size))
        remedies.append(
            f"training.loss_chunk_size={fewer} (logits of {training.loss_chunk_size} tokens at once are "
            f"{logits_bytes / 1e6:,.0f} MB)"
        )
    if not training.use_amp:
        remedies.append("training.use_amp=true (activations in 16 bits)")
    if training.batch_size > 1:
        half = training.batch_size // 2
        more = f"training.gradient_accumulation_steps={2 * training.gradient_accumulation_steps}"
        keep = "" if training.global_batch_size else f" {more}"
        remedies.append(f"training.batch_size={half}{keep} (the same step in smaller parts)")
    if model.gradient_checkpointing and model.gradient_checkpointing_mode == "selective":
        remedies.append("model.gradient_checkpointing_mode=whole (products are recomputed too)")
    if not model.gradient_checkpointing:
        remedies.append("model.gradient_checkpointing=true (a third more time)")
    if strategy_name(config) == "ddp":
        remedies.append("distributed.strategy=fsdp (weights and optimizer state cut over the ranks)")
    if strategy_name(config) in ("fsdp", "deepspeed") and not config.distributed.cpu_offload:
        remedies.append("distributed.cpu_offload=true (state in host memory)")
    remedies.append(f"model.max_seq_length={model.max_seq_length // 2} (another data set), or a smaller model")
    return remedies


def _use(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(device).total_memory
    return f" (at most {torch.cuda.max_memory_allocated(device) / 1e9:.1f} of {total / 1e9:.1f} GB were in use)"
