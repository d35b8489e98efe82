"""A plan in words."""

from datetime import timedelta

from ultrathink_model.config import Config
from ultrathink_model.planning.hardware import Device
from ultrathink_model.planning.media import image_flops, media_flops_per_token, sound_flops
from ultrathink_model.planning.plan import GIB, Plan


def describe(plan: Plan) -> str:
    """Parameters, work, memory and disk, as lines of a table."""
    parameters, memory, config = plan.parameters, plan.memory, plan.config
    lines = ["parameters"]
    lines += [_row(name, f"{number:,}") for name, number in parameters.parts.items()]
    lines += [_row("in all", f"{parameters.total:,}"), _row("active for one token", f"{parameters.active:,}")]
    lines += ["", "operations per token"]
    lines += [_row("forward", f"{plan.forward_flops / 1e9:,.3f} GFLOP")]
    again = " with recomputation" if config.model.gradient_checkpointing else ""
    lines += [_row("training", f"{plan.training_flops / 1e9:,.3f} GFLOP{again}")]
    if config.advanced.enable_multimodal:
        lines += _media_rows(config)
    ranks = f"{plan.ranks} rank{'s' if plan.ranks > 1 else ''}, strategy {plan.strategy}"
    micro = f"{config.training.batch_size} sequences of {config.model.max_seq_length:,}"
    lines += ["", f"memory of one rank at its peak ({ranks}, {micro})"]
    lines += [_row(name, _size(size)) for name, size in memory.parts.items()]
    lines += [_row("in all", _size(memory.total))]
    if memory.host:
        lines += [_row("and in host memory", _size(memory.host))]
    whole, none = _size(memory.activations["whole"]), _size(memory.activations["none"])
    lines += [_row("activations", f"{none}, or {whole} with model.gradient_checkpointing")]
    kept = f"{config.training.keep_checkpoints} kept, one being written, and final_model/"
    lines += ["", "disk", _row("one checkpoint", _size(plan.checkpoint)), _row(kept, _size(plan.disk))]
    tokens = "set training.max_steps, data.train_samples or --samples" if plan.tokens is None else f"{plan.tokens:,}"
    return "\n".join([*lines, "", f"training tokens: {tokens}"])


def describe_device(plan: Plan, name: str, device: Device, utilisation: float, price: float | None) -> str:
    """Whether the plan fits a device, how fast it is there, and what the whole run takes and costs."""
    state = "fits" if plan.fits(device) else "does NOT fit"
    speed = plan.tokens_per_second(device, utilisation)
    lines = [f"{plan.ranks} × {device.title} (--device {name})"]
    lines += [_row("memory", f"{state}: {_size(plan.memory.total)} of {device.memory_gib:g} GiB")]
    lines += [_row("speed", f"{speed:,.0f} tokens/s at {utilisation:.0%} of the peak (--utilisation)")]
    if plan.config.advanced.enable_multimodal:
        seen = plan.image_tokens_per_second(device, utilisation)
        images = seen / plan.config.multimodal.image_grid**2
        lines += [_row("speed in sequences full of images", f"{seen:,.0f} tokens/s, {images:,.0f} images/s")]
    if plan.tokens is not None:
        seconds = plan.tokens / speed
        lines += [_row("time", str(timedelta(seconds=round(seconds))))]
        price = device.price if price is None else price
        if price is not None:
            lines += [_row("cost", f"${seconds / 3600 * plan.ranks * price:,.2f} at ${price:.2f} an hour (--price)")]
    return "\n".join(lines)


def _media_rows(config: Config) -> list[str]:
    media = config.multimodal
    image = f"{image_flops(config) / 1e9:,.3f} GFLOP forward, {media.image_grid**2} tokens"
    sound = f"{sound_flops(config) / 1e9:,.3f} GFLOP forward, {media.longest_audio_tokens} tokens"
    trained = " (frozen encoders)" if media.freeze_encoders else ""
    return [
        _row(f"an image of {media.image_size} × {media.image_size}", image),
        _row(f"a sound of {media.max_audio_seconds:g} s", sound),
        _row("training, for a token of an image", f"{media_flops_per_token(config) / 1e9:,.3f} GFLOP more{trained}"),
    ]


def _row(name: str, value: str) -> str:
    return f"  {name:44}{value}"


def _size(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"
