"""Where a run begins: at its first step, after its last checkpoint, or at its end."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrathink_model.config import Config, load_config
from ultrathink_model.data import DataManifest
from ultrathink_model.errors import CheckpointError, ConfigError
from ultrathink_model.models.model_folder import existing_folder
from ultrathink_model.tracking.run_folder import NOT_PART_OF_IDENTITY, RunFolder, RunIdentity
from ultrathink_model.training.checkpoint import (
    MANIFEST,
    CheckpointManifest,
    drop_checkpoints,
    newest_valid_checkpoint,
    remove_leftovers,
    verify_checkpoint,
)
from ultrathink_model.training.result import RESULT_FILE, StageResult, load_result

# Keys of the section `model` that change neither the weights' shapes nor the function.
NOT_ARCHITECTURE = {
    "gradient_checkpointing",
    "gradient_checkpointing_mode",
    "use_flash_attention",
    "initializer_range",
    "max_seq_length",
}
MOE_ARCHITECTURE = {
    "num_knowledge_experts",
    "num_skill_experts",
    "num_meta_experts",
    "num_safety_experts",
    "moe_top_k",
    "layer_frequency",
    "expert_hidden_size",
}

# Sections that do not make another run.
WATCHING = (*NOT_PART_OF_IDENTITY, "output")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that is whole and fits the run."""

    folder: Path
    manifest: CheckpointManifest


@dataclass(frozen=True)
class Claim:
    """A run's folder, taken for a start.

    Attributes:
        result: What the run came to, when it is finished already; then the folder was left as it is.
        named: The checkpoint that `training.resume` names.
        goes_on: Whether the folder held this same run.
        changes: Keys in which the run that the folder held differs from this one, each with both values.
    """

    result: StageResult | None = None
    named: ResumePoint | None = None
    goes_on: bool = False
    changes: tuple[str, ...] = ()


def claim_folder(
    config: Config, manifest: DataManifest, folder: RunFolder, run_name: str, init_from: Path | None, global_batch: int
) -> Claim:
    """Takes the run's folder, from which another run's files are moved away; rank 0 alone calls it.

    Args:
        config: `training.resume` says whether to go on, and from where.
        manifest: Prepared data.
        folder: The run's folder.
        run_name: Name of the run.
        init_from: Model folder of the first weights.
        global_batch: Sequences in one step, over all ranks.

    Raises:
        CheckpointError: The checkpoint that `training.resume` names is missing, damaged or does not fit; or this run was
            cut short, and the data have changed since.
    """
    resume = config.training.resume
    identity = run_identity(config, manifest, run_name, init_from)
    named = None
    if resume == "auto":
        identity = settle_changed_data(config, folder, identity)
        result = finished_result(folder, identity)
        if result is not None:
            return Claim(result=result)
    elif resume != "never":
        named = find_named(Path(resume))
        require_fit(named, config, manifest, global_batch)
    changes = _changes_of_run(folder, config)
    goes_on = folder.begin(identity, config, fresh=resume == "never")
    (folder.path / RESULT_FILE).unlink(missing_ok=True)
    remove_leftovers(folder.path)
    return Claim(named=named and _moved(named, folder), goes_on=goes_on, changes=() if goes_on else changes)


def resume_point(
    claim: Claim, config: Config, manifest: DataManifest, folder: RunFolder, global_batch: int
) -> ResumePoint | None:
    """The checkpoint that a start goes on from, None where it begins at step 0; rank 0 alone calls it.

    Raises:
        CheckpointError: The newest whole checkpoint does not fit this run.
    """
    if claim.changes and claim.named is None:
        logger.warning(
            "%s held a run that differs from this one, which begins anew; its files are in %s: %s. To go on from its "
            "state with what can be changed, name its checkpoint: training.resume=PATH",
            folder.path,
            folder.path / "previous",
            "; ".join(claim.changes),
        )
    if claim.named is not None:
        last = claim.named.manifest.position.step
        # They are of a future that is now lived again; a later start must not go on from them.
        drop_checkpoints((step, path) for step, path in folder.checkpoints() if step > last)
        point = claim.named
    else:
        found = newest_valid_checkpoint(folder.checkpoints()) if claim.goes_on else None
        if found is None:
            return None
        point = ResumePoint(*found)
        require_fit(point, config, manifest, global_batch)
    log_changes(point, config)
    return point


def last_good_checkpoint(folder: RunFolder) -> ResumePoint | None:
    """The newest whole checkpoint that was not taken among bad steps; rank 0 alone calls it."""
    for candidate in sorted(folder.checkpoints(), reverse=True):
        found = newest_valid_checkpoint([candidate])
        if found is not None and found[1].position.bad_steps_in_row == 0:
            return ResumePoint(*found)
    return None


def run_identity(config: Config, manifest: DataManifest, run_name: str, init_from: Path | None) -> RunIdentity:
    """What makes two starts the same run: the content of the data and of the first weights counts too.

    Not so the weights of the run's own `final_model/`, which the run replaces when it ends.
    """
    identity = RunIdentity.of(config, run_name, init_from)
    digest = hashlib.sha256(identity.config_hash.encode())
    own = RunFolder(config.output.output_dir).final_model.resolve()
    reward_model = RunFolder(config.rlhf.reward_run).final_model if config.rlhf.reward_run else None
    for path in [*_weight_files(init_from, own), *_weight_files(reward_model, own)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    update = {"config_hash": digest.hexdigest(), "data_fingerprint": manifest.fingerprint}
    return identity.model_copy(update=update)


def settle_changed_data(config: Config, folder: RunFolder, identity: RunIdentity) -> RunIdentity:
    """Decides what becomes of a run that was cut short and whose data have changed since, all else being equal.

    Returns:
        The identity of that run where `data.allow_changed` lets it go on, else the identity as given.

    Raises:
        CheckpointError: It may not go on; its checkpoints are left as they are.
    """
    record = folder.record()
    if record is None or record.status == "finished" or not folder.checkpoints():
        return identity
    known = record.identity
    same = known.model_copy(update={"data_fingerprint": identity.data_fingerprint}) == identity
    if known == identity or not same:
        return identity
    if config.data.allow_changed:
        return known
    raise CheckpointError(
        f"{folder.path} holds a run that was cut short, and its data have changed since: {known.data_fingerprint} → "
        f"{identity.data_fingerprint}. Set data.allow_changed=true to go on with the new data, put the old data back, or "
        "begin anew with training.resume=never (the run's files are moved to previous/)."
    )


def finished_result(folder: RunFolder, identity: RunIdentity) -> StageResult | None:
    """What a run came to, when its folder holds just that run, finished, and its model."""
    record = folder.record()
    if record is None or record.status != "finished" or record.identity != identity or not folder.final_model.is_dir():
        return None
    return load_result(folder.path)


def find_named(path: Path) -> ResumePoint:
    """The checkpoint at a path that the user named: its own folder, or a run's folder, whose newest is taken.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if (path / MANIFEST).is_file() or path.name.startswith("checkpoint_"):
        if not path.is_dir():
            raise CheckpointError(f"training.resume={path} does not exist; name a folder checkpoint_<step>.pt.")
        return ResumePoint(path, verify_checkpoint(path))
    found = newest_valid_checkpoint(RunFolder(path).checkpoints())
    if found is None:
        raise CheckpointError(
            f"training.resume={path} holds no whole checkpoint; name a folder checkpoint_<step>.pt or a run's folder, "
            "or take auto or never."
        )
    return ResumePoint(*found)


def require_fit(point: ResumePoint, config: Config, manifest: DataManifest, global_batch: int) -> None:
    """Refuses a checkpoint of other data or another model.

    Raises:
        CheckpointError: Tokenizer, data (unless `data.allow_changed`), architecture, optimizer or global batch differ; the message says how.
    """
    saved, current = point.manifest, config.model_dump(mode="json")
    changed_data = saved.data_fingerprint != manifest.fingerprint
    if changed_data and config.data.allow_changed:
        logger.warning(
            "goes on with other data than %s was trained on: %s → %s",
            point.folder,
            saved.data_fingerprint,
            manifest.fingerprint,
        )
    refused = [
        f"{what}: {before} → {now}"
        for what, before, now in (
            ("tokenizer", saved.tokenizer_hash, manifest.tokenizer_hash),
            (
                "data",
                saved.data_fingerprint,
                saved.data_fingerprint if config.data.allow_changed else manifest.fingerprint,
            ),
            ("global batch in sequences", saved.global_batch, global_batch),
        )
        if before != now
    ]
    changes = dict(_changes(saved.config, current))
    fixed = _fixed_keys(saved.config, current)
    refused += [f"{key}: {before} → {now}" for key, (before, now) in changes.items() if key in fixed]
    if refused:
        raise CheckpointError(
            f"{point.folder} cannot be resumed by this run, which differs in what cannot change: {'; '.join(refused)}. "
            "Put these back, or start anew with training.resume=never (--init-from takes the weights alone)."
        )


def log_changes(point: ResumePoint, config: Config) -> None:
    """Shows in the log each key whose value the checkpoint was saved with another of."""
    for key, (before, now) in _changes(point.manifest.config, config.model_dump(mode="json")):
        logger.info("changed since %s: %s: %s → %s", point.folder.name, key, before, now)


def _changes_of_run(folder: RunFolder, config: Config) -> tuple[str, ...]:
    """What is different in the config of the run that a folder holds; nothing where there is none that can be read."""
    if folder.record() is None:
        return ()
    try:
        before = load_config(folder.config_file).model_dump(mode="json")
    except ConfigError:
        return ()
    now = config.model_dump(mode="json")
    return tuple(
        f"{key}: {old} → {new}"
        for key, (old, new) in _changes(before, now)
        if key.partition(".")[0] not in WATCHING and key != "training.resume"
    )


def _fixed_keys(saved: dict[str, Any], current: dict[str, Any]) -> set[str]:
    """The keys that a resumed run may not change."""
    keys = {f"model.{key}" for key in current["model"] if key not in NOT_ARCHITECTURE}
    keys |= {f"advanced.{key}" for key in current["advanced"] if key.startswith("enable_")} | {"training.optimizer"}
    if saved["advanced"]["enable_moe"]:
        keys |= {f"moe.{key}" for key in MOE_ARCHITECTURE}
    if saved["advanced"]["enable_dre"]:
        keys |= {"dre.layer_frequency", "dre.dense_layers"}
    return keys


def _changes(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for section in saved.keys() | current.keys():
        before, now = saved.get(section, {}), current.get(section, {})
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                yield f"{section}.{key}", (before.get(key), now.get(key))


def _moved(point: ResumePoint, folder: RunFolder) -> ResumePoint:
    """The same checkpoint, which may have been moved away with the run that wrote it."""
    candidates = [point.folder, *(folder.path / "previous").glob(f"*/{point.folder.name}")]
    for candidate in candidates:
        if (candidate / MANIFEST).is_file() and verify_checkpoint(candidate).digest == point.manifest.digest:
            return ResumePoint(candidate, point.manifest)
    raise CheckpointError(f"{point.folder} is gone: another process has moved it.")


def _weight_files(folder: Path | None, own: Path) -> list[Path]:
    """The files of a model that a run starts from; none of the one that it writes itself."""
    if folder is None or folder.resolve() == own:
        return []
    return sorted(existing_folder(folder).glob("*.safetensors"))
