"""Preference pairs and the reward model that learns from them: as a stage of its own, or at the start of RLHF."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from ultrathink_model.alignment.pairs import PairSplit, load_pairs, make_pairs, save_pairs
from ultrathink_model.alignment.reward import RewardModel, RewardRecord, load_reward_model, save_reward_model
from ultrathink_model.alignment.reward_training import RewardTrainer
from ultrathink_model.alignment.stage import PAIRS_FILE, REWARD_MODEL, Stage, run_in_folder, save_position, write_result
from ultrathink_model.alignment.starting_model import aligned_config, check_model_use, starting_model
from ultrathink_model.config import Config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import init_distributed
from ultrathink_model.errors import TokenizerError
from ultrathink_model.models.model_folder import replaced_folder
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically
from ultrathink_model.training.checkpoint import RunPosition, load_tensors
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.resume import ResumePoint
from ultrathink_model.training.session import ALONE, StagePlace, on_main

logger = logging.getLogger(__name__)


def learn_rewards(
    config: Config, *, manifest: DataManifest, run_name: str, init_from: Path | None, place: StagePlace = ALONE
) -> StageResult:
    """Makes preference pairs and trains a reward model on them to its end; every rank calls it.

    `pairs.jsonl` keeps the pairs, and `final_model/` is the reward model; an RLHF stage whose `rlhf.reward_run` names
    the folder learns by it. The same call again goes on from the newest checkpoint (`training.checkpoint_steps`).

    Args:
        config: The run, with `rlhf.only_reward_model`; its architecture gives way to that of the model.
        manifest: Prepared data, with the model's tokenizer.
        run_name: Its name.
        init_from: The model folder that the pairs are made with and the reward model starts from.
        place: Where the stage stands in its pipeline.

    Raises:
        TrainingStoppedError: A signal came; the state is saved.
        UltrathinkError: A mistake that the user can mend, in the config, the data, a checkpoint or the loss.
    """
    context = init_distributed(config)
    config = aligned_config(config, init_from)
    assert init_from is not None, "aligned_config refuses None"
    check_model_use(config, manifest, init_from)

    def work(stage: Stage, point: ResumePoint | None) -> StageResult:
        model = starting_model(config, init_from).to(context.device)
        return _learn(stage, settle_pairs(stage, model), model, point)

    return run_in_folder(config, context, manifest, run_name, init_from, place, config.rlhf.reward_batch_size, work)


def _learn(stage: Stage, pairs: PairSplit, start: Transformer, point: ResumePoint | None) -> StageResult:
    """The reward model, from its first step or after a checkpoint, written to `final_model/`."""
    config, context = stage.config, stage.context
    trainer = RewardTrainer(config, start, stage.manifest.pad_id, context)
    position = RunPosition()
    if point is not None:
        state = trainer.learner.state_dict()
        load_tensors(point.folder, state)
        trainer.learner.load_state_dict(state)
        position = point.manifest.position.model_copy()
        logger.info("goes on after step %d of %s", position.step, point.folder)
    writer = MetricsWriter(stage.folder.metrics_file) if context.is_main else None
    if writer:
        writer.truncate_after(position.step)

    def after_step(step: int, steps: int, loss: float) -> None:
        position.step = step
        position.tokens = _tokens_of(pairs) * step // max(1, steps // config.rlhf.reward_epochs)
        if writer and (step % config.logging.log_steps == 0 or step in (1, steps)):
            writer.write(step, {"tokens": position.tokens, "rlhf/reward_train_loss": loss})
            logger.info("reward model: step %d/%d, loss %.4f", step, steps, loss)
        is_asked = stage.is_asked_to_stop()
        if is_asked or step % (config.training.checkpoint_steps or steps) == 0:
            tensors, strategy = trainer.learner.state_dict(), trainer.learner.strategy_name
            save_position(stage, position, tensors, {}, strategy, config.rlhf.reward_batch_size)
        if is_asked:
            stage.stop(f"after step {step} of {steps} of its reward model, and saved")

    model = trainer.fit(pairs, after_step, first_step=position.step)

    def write() -> StageResult:
        save_reward_model(model, stage.manifest.tokenizer_folder, stage.folder.final_model)
        MetricsWriter(stage.folder.metrics_file).write(
            position.step, {"tokens": position.tokens, **record_line(model.record)}
        )
        return write_result(stage, position.step, position.tokens)

    return on_main(context, write)


def record_line(record: RewardRecord) -> dict[str, float]:
    """What is known of a reward model, as metrics."""
    return {
        "rlhf/reward_accuracy": record.accuracy,
        "rlhf/reward_prompt_accuracy": record.prompt_accuracy,
        "rlhf/reward_loss": record.loss,
        "rlhf/length_accuracy": record.length_accuracy,
        "rlhf/calibration_error": record.calibration_error,
    }


def adopt_rewards(stage: Stage) -> None:
    """Copies the pairs and the reward model of the run that `rlhf.reward_run` names into the stage's folder.

    Raises:
        TokenizerError: It has another tokenizer.
    """
    if stage.config.rlhf.reward_run is not None:
        source = RunFolder(stage.config.rlhf.reward_run)
        on_main(stage.context, lambda: _copy_rewards(source, stage))


def _copy_rewards(source: RunFolder, stage: Stage) -> None:
    pairs, model = stage.folder.path / PAIRS_FILE, stage.folder.path / REWARD_MODEL
    if pairs.exists() and model.exists():
        return
    if Tokenizer.load(source.final_model).hash != stage.manifest.tokenizer_hash:
        raise TokenizerError(
            f"rlhf.reward_run={source.path} has another tokenizer than the data in {stage.manifest.path}; make the reward "
            "model with the same data config"
        )
    with replaced_folder(model) as new:
        shutil.copytree(source.final_model, new, dirs_exist_ok=True)
    write_atomically(pairs, (source.path / PAIRS_FILE).read_text(encoding="utf-8"))


def settle_pairs(stage: Stage, policy: Transformer) -> PairSplit:
    """The pairs of the run's folder; made, and kept there, where it has none."""
    path = stage.folder.path / PAIRS_FILE
    if not on_main(stage.context, path.exists):
        pairs = make_pairs(stage.config, stage.manifest, stage.tokenizer, policy, stage.context)
        on_main(stage.context, lambda: save_pairs(pairs, stage.tokenizer, path))
    if stage.is_asked_to_stop():
        stage.stop("after its preference pairs were saved")
    pairs = load_pairs(path)
    logger.info("%d preference pairs to learn from, %d held out", len(pairs.train), len(pairs.held_out))
    return pairs


def settle_reward_model(stage: Stage, policy: Transformer, pairs: PairSplit) -> RewardModel:
    """The reward model of the run's folder; trained, and kept there, where it has none."""
    path = stage.folder.path / REWARD_MODEL
    if not on_main(stage.context, path.exists):
        trainer = RewardTrainer(stage.config, policy, stage.manifest.pad_id, stage.context)
        model = trainer.fit(pairs, _reward_progress(stage))
        on_main(stage.context, lambda: save_reward_model(model, stage.manifest.tokenizer_folder, path))
        if stage.is_asked_to_stop():
            stage.stop("after its reward model was saved")
    return load_reward_model(path, stage.context.device)


def _reward_progress(stage: Stage) -> Callable[[int, int, float], None]:
    def after_step(step: int, steps: int, loss: float) -> None:
        if stage.is_asked_to_stop():
            stage.stop("while its reward model was trained, which begins anew then; its pairs are saved")
        if stage.context.is_main and (step % stage.config.logging.log_steps == 0 or step == steps):
            logger.info("reward model: step %d/%d, loss %.4f", step, steps, loss)

    return after_step


def _tokens_of(pairs: PairSplit) -> int:
    return sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs.train)
