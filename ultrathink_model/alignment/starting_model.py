"""The model that alignment starts from, and what must hold before it can."""

import logging
from pathlib import Path
from typing import Any

from ultrathink_model.alignment.stage import PAIRS_FILE
from ultrathink_model.config import Config, make_config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext, strategy_name
from ultrathink_model.distributed.deepspeed_config import deepspeed_config
from ultrathink_model.errors import CheckpointError, ConfigError, TokenizerError
from ultrathink_model.models.hf import RUN_CONFIG_FILE, read_model_config
from ultrathink_model.models.transformer import Transformer, build_model
from ultrathink_model.models.upcycle import initialise_from
from ultrathink_model.tracking.run_folder import RunFolder

# Keys of the section `model` that are the run's own to choose.
NOT_ARCHITECTURE = (
    "max_seq_length",
    "gradient_checkpointing",
    "gradient_checkpointing_mode",
    "use_flash_attention",
    "initializer_range",
)
FEATURES = {"enable_moe": "moe", "enable_dre": "dre"}

logger = logging.getLogger(__name__)


def aligned_config(config: Config, init_from: Path | None) -> Config:
    """The run's config with the architecture of the model that it aligns.

    Alignment does not change what a model is: sections `model`, `moe` and `dre` and their switches come from the
    folder. A feature that the run asks for and the folder lacks is grafted on, as in training.

    Raises:
        ConfigError: There is no model to align.
        CheckpointError: The folder is not a model.
    """
    if init_from is None:
        raise ConfigError(
            "advanced.enable_rlhf and constitutional.enabled align a trained model, and none is named; add --init-from and "
            "the final_model/ folder of a finished run"
        )
    source = read_model_config(init_from)
    values: dict[str, Any] = config.model_dump()
    kept = {key: values["model"][key] for key in NOT_ARCHITECTURE}
    values["model"] = source.model.model_dump() | kept
    for switch, section in FEATURES.items():
        if getattr(source.advanced, switch):
            values["advanced"][switch] = True
            values[section] = getattr(source, section).model_dump()
    # The section `constitutional` is the run's own: it says how, and not what, the head learns.
    values["advanced"]["enable_constitutional"] |= source.advanced.enable_constitutional
    resolved = make_config(values)
    for section in ("model", "advanced", "moe", "dre"):
        before, now = getattr(config, section).model_dump(), getattr(resolved, section).model_dump()
        for key in before:
            if before[key] != now[key]:
                logger.info(
                    "%s.%s is %s, as in %s (the config says %s)", section, key, now[key], init_from, before[key]
                )
    return resolved


def check_alignment(config: Config, manifest: DataManifest, init_from: Path, context: RankContext) -> None:
    """Refuses what RLHF cannot do, before anything is computed.

    Raises:
        CheckpointError: The run that `rlhf.reward_run` names holds no finished reward model.
        ConfigError: The ranks do not divide the batches, or would wait for each other; or the precision is fp16.
        TokenizerError: The data was prepared with another tokenizer than the model's.
    """
    check_model_use(config, manifest, init_from)
    if config.advanced.enable_dre and _gathers_parts_of_blocks(config, context):
        raise ConfigError(
            "advanced.enable_dre=true and ZeRO 3 do not go together in alignment: it gathers each part of a block when it "
            "runs, and by their own tokens ranks run some parts more often than others, so that they would wait for each "
            "other; set distributed.zero_stage=2, or distributed.strategy=fsdp, which gathers whole blocks"
        )
    _require_rewards(config)
    rlhf, ranks = config.rlhf, context.world_size
    group = rlhf.group_size if rlhf.algorithm == "grpo" else 1
    for key, size, unit in (
        ("ppo_batch_size", rlhf.ppo_batch_size // group, f" in groups of {group}" if group > 1 else ""),
        ("ppo_minibatch_size", rlhf.ppo_minibatch_size, ""),
    ):
        if size % ranks:
            raise ConfigError(
                f"rlhf.{key}={getattr(rlhf, key)}{unit} does not divide over {ranks} ranks: {size} / {ranks} leaves "
                f"{size % ranks} over; make it a multiple of {ranks * (group if key == 'ppo_batch_size' else 1)}"
            )


def check_model_use(config: Config, manifest: DataManifest, init_from: Path) -> None:
    """Refuses what nothing that generates and learns in turns can do; see `check_alignment`."""
    if config.training.use_amp and config.training.amp_dtype == "fp16":
        raise ConfigError("training.amp_dtype=fp16 needs a loss scaler, which alignment has not; take bf16")
    if (init_from / RUN_CONFIG_FILE).is_file() and Tokenizer.load(init_from).hash != manifest.tokenizer_hash:
        raise TokenizerError(
            f"--init-from {init_from} was trained with another tokenizer than the data in {manifest.path} has; set "
            f"data.tokenizer_name={init_from}, or take the data config that the model was trained with"
        )


def _require_rewards(config: Config) -> None:
    if config.rlhf.reward_run is None:
        return
    run = RunFolder(config.rlhf.reward_run)
    if not ((run.path / PAIRS_FILE).is_file() and run.final_model.is_dir()):
        raise CheckpointError(
            f"rlhf.reward_run={run.path} holds no finished reward model ({PAIRS_FILE} and final_model/); make it with "
            f"rlhf.only_reward_model=true and output.output_dir={run.path}"
        )


def _gathers_parts_of_blocks(config: Config, context: RankContext) -> bool:
    if strategy_name(config) != "deepspeed":
        return False
    return bool(deepspeed_config(config, context)["zero_optimization"]["stage"] == 3)


def starting_model(config: Config, init_from: Path) -> Transformer:
    """The model of the folder, in evaluation mode, built by the aligned config.

    Alignment reads text alone: what the model has for images and sound stays as it is.
    """
    model = build_model(config, "cpu")
    report = initialise_from(model, init_from)
    logger.info("weights of %s: %s", init_from, report.summary())
    if model.media_encoder is not None:
        model.media_encoder.requires_grad_(False)
    return model.eval()


def first_routing_step(config: Config, init_from: Path) -> int:
    """Where the reasoning engine's annealing stands: at its end, or at its start where it has just been grafted on."""
    return config.advanced.dre_warmup_steps if read_model_config(init_from).advanced.enable_dre else 0
