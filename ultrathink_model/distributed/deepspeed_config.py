"""DeepSpeed's JSON file, with what our config decides filled in."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.errors import ConfigError, DependencyError

SHIPPED_FOLDER = Path("configs")

# Sections that would decide a second time what our config decides.
REFUSED_SECTIONS = {
    "optimizer": "training.optimizer and the keys beside it",
    "scheduler": "training.schedule",
    "amp": "training.use_amp",
}

logger = logging.getLogger(__name__)


def require_deepspeed() -> None:
    """Refuses to go on without the package; it does not import it, which takes seconds.

    Raises:
        DependencyError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise DependencyError(
            "distributed.strategy=deepspeed and distributed.launcher=deepspeed need the package deepspeed: "
            "DS_BUILD_OPS=0 pip install 'ultrathink-model[deepspeed]', or take torchrun and distributed.strategy=fsdp"
        )


def deepspeed_config(config: Config, context: RankContext) -> dict[str, Any]:
    """What `deepspeed.initialize` takes: the file of `distributed.deepspeed_config`, or the stage's own settings.

    A value of `"auto"` is filled from our config. Where the file states a number that our config states too, the
    two must agree.

    Raises:
        ConfigError: The file cannot be read, contradicts our config, or has `auto` where nothing can fill it in.
    """
    path = config.distributed.deepspeed_config
    stage = config.distributed.zero_stage
    values = _read(find_config_file(path)) if path else _own_settings(stage)
    for section, remedy in REFUSED_SECTIONS.items():
        if section in values:
            raise ConfigError(f"{path}: the section {section} is not read; set {remedy} in the config, and remove it")
    for name, ours in _decided_values(config, context).items():
        _fill(values, name.split("."), ours, path or "")
    zero = values.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage={zero.get('stage')} is not 1, 2 or 3")
    left = _autos(values)
    if left:
        raise ConfigError(f'{path}: {left[0]}="auto" cannot be filled from our config; give it a value, or remove it')
    # Our optimizers are torch's and our own, on the device where DeepSpeed puts the state.
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **values}


def find_config_file(path: str) -> Path:
    """The file of that path, or the one of the same name that `configs/` ships.

    The guide writes `config/deepspeed_z3.json` where the folder is `configs/`.

    Raises:
        ConfigError: There is neither.
    """
    given = Path(path)
    if given.is_file():
        return given
    shipped = SHIPPED_FOLDER / given.name
    if shipped.is_file():
        logger.warning("distributed.deepspeed_config=%s does not exist; %s is taken.", path, shipped)
        return shipped
    raise ConfigError(
        f"distributed.deepspeed_config={path} is not a file, and there is no {shipped} either; "
        "configs/deepspeed_z1.json, _z2.json and _z3.json are shipped"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"distributed.deepspeed_config={path} is not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"distributed.deepspeed_config={path} holds a {type(values).__name__}, not an object")
    return values


def _own_settings(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "auto"}}}


def _decided_values(config: Config, context: RankContext) -> dict[str, Any]:
    """What our config decides, by the dotted name that it has in DeepSpeed's."""
    training = config.training
    accumulation = training.gradient_accumulation_steps
    if training.global_batch_size is not None:
        accumulation = training.global_batch_size // (training.batch_size * context.world_size)
    # On a machine without a GPU all state is in host memory as it is.
    offload = "cpu" if config.distributed.cpu_offload and context.device.type != "cpu" else "none"
    return {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": training.batch_size * accumulation * context.world_size,
        "gradient_clipping": training.gradient_clipping or 0.0,
        "steps_per_print": None,
        # Weights stay in float32; training.use_amp runs the products in amp_dtype.
        "bf16.enabled": False,
        "fp16.enabled": False,
        "zero_optimization.stage": config.distributed.zero_stage,
        "zero_optimization.offload_optimizer.device": offload,
        "zero_optimization.offload_param.device": offload,
    }


# The file of distributed.deepspeed_config names the stage and what is offloaded; our keys only fill in its autos.
FILE_DECIDES = ("zero_optimization.stage", "zero_optimization.offload_optimizer.device", "steps_per_print")


def _fill(values: dict[str, Any], parts: list[str], ours: Any, path: str) -> None:
    """Sets one value where it is `auto` or where DeepSpeed needs it, and refuses another than ours."""
    *sections, key = parts
    name = ".".join(parts)
    holder = values
    for section in sections:
        if not isinstance(holder.get(section), dict):
            return
        holder = holder[section]
    given = holder.get(key, "auto" if not sections else None)
    if given == "auto":
        holder[key] = ours
    elif given is not None and given != ours and name not in (*FILE_DECIDES, "zero_optimization.offload_param.device"):
        raise ConfigError(
            f'{path}: {name}={given} contradicts our config, which makes it {ours}; write "auto" there, '
            "or change the config"
        )


def _autos(values: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        if value == "auto":
            found.append(f"{prefix}{key}")
        elif isinstance(value, dict):
            found += _autos(value, f"{prefix}{key}.")
    return found
