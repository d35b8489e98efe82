"""The alignment stage: preference pairs, a reward model, and a policy that learns from them."""

import contextlib
import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrathink_model.alignment.dpo import DPO
from ultrathink_model.alignment.draws import HEADS, make_generator
from ultrathink_model.alignment.experience import Algorithm
from ultrathink_model.alignment.grpo import GRPO
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.pairs import PairSplit, load_pairs, make_pairs, save_pairs
from ultrathink_model.alignment.policy_run import Players, PolicyRun
from ultrathink_model.alignment.ppo import PPO, ValueHead
from ultrathink_model.alignment.reward import RewardModel, load_reward_model, save_reward_model
from ultrathink_model.alignment.reward_training import RewardTrainer
from ultrathink_model.alignment.rewards import make_rewards, needs_reward_model
from ultrathink_model.alignment.rounds import improve, measured_line
from ultrathink_model.alignment.safety_answers import measure_answers
from ultrathink_model.alignment.samples import held_out_samples
from ultrathink_model.alignment.stage import Stage, held_out_loss, write_result
from ultrathink_model.alignment.starting_model import (
    aligned_config,
    check_alignment,
    first_routing_step,
    starting_model,
)
from ultrathink_model.config import Config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext, init_distributed
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.resume import ResumePoint, claim_folder, resume_point
from ultrathink_model.training.rng import repeatable_kernels, seed_generators
from ultrathink_model.training.session import ALONE, StagePlace, mlflow_run, noted_ending, on_main
from ultrathink_model.training.signals import StopSignals

PAIRS_FILE = "pairs.jsonl"
REWARD_MODEL = "reward_model"

logger = logging.getLogger(__name__)


def align(
    config: Config, *, manifest: DataManifest, run_name: str, init_from: Path | None, place: StagePlace = ALONE
) -> StageResult:
    """Aligns a trained model to its end; every rank calls it.

    The same call again goes on from the newest whole checkpoint, with the pairs and the reward model that the folder
    holds, and returns the result at once where the run is finished (`training.resume: auto`).

    Args:
        config: The run; its architecture gives way to that of the model.
        manifest: Prepared data, with the model's tokenizer.
        run_name: Its name, in MLflow too.
        init_from: The model folder that the policy starts from, and that stays its reference.
        place: Where the stage stands in its pipeline.

    Returns:
        The result, on every rank.

    Raises:
        TrainingStoppedError: A signal came; the state is saved.
        UltrathinkError: A mistake that the user can mend, in the config, the data, a checkpoint or the loss.
    """
    context = init_distributed(config)
    config = aligned_config(config, init_from)
    assert init_from is not None, "aligned_config refuses None"
    check_alignment(config, manifest, init_from, context)
    folder = RunFolder(config.output.output_dir)
    rollouts = config.rlhf.ppo_batch_size * config.rlhf.rlhf_steps_per_iteration
    with StopSignals() as signals, repeatable_kernels(config.training.deterministic):
        claim = on_main(context, lambda: claim_folder(config, manifest, folder, run_name, init_from, rollouts))
        if claim.result is not None:
            logger.info("%s is finished already, after %d rounds", run_name, claim.result.steps)
            return claim.result
        if context.is_main and not claim.goes_on:
            _forget_other_runs(folder)
        with noted_ending(config, context, folder):
            point = on_main(context, lambda: resume_point(claim, config, manifest, folder, rollouts))
            tokenizer = Tokenizer.load(manifest.tokenizer_folder)
            stage = Stage(config, context, manifest, tokenizer, folder, run_name, signals)
            with mlflow_run(config, folder, run_name, place) if context.is_main else contextlib.nullcontext():
                run = _prepare(stage, init_from, point)
                improve(stage, run, place)
                return _finish(stage, run)


def _forget_other_runs(folder: RunFolder) -> None:
    """Deletes the pairs and the reward model of another run, which this one must not take for its own."""
    (folder.path / PAIRS_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder.path / REWARD_MODEL, ignore_errors=True)


def _prepare(stage: Stage, init_from: Path, point: ResumePoint | None) -> PolicyRun:
    """The run at its first round or after a checkpoint; pairs and reward model are made where they are missing."""
    config, context = stage.config, stage.context
    seed_generators(config.training.seed, context.rank)
    policy = starting_model(config, init_from).to(context.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    pairs = _pairs(stage, policy)
    learnt = _reward_model(stage, policy, pairs) if needs_reward_model(config.rlhf) else None
    players = Players(reference, make_rewards(config.rlhf, learnt, stage.tokenizer, context.device), pairs)
    algorithm, head = make_algorithm(config, context, players, stage.manifest)
    rate = config.rlhf.policy_learning_rate or config.training.learning_rate
    learner = Learner(config, context, policy, head, rate, config.rlhf.value_learning_rate)
    run = PolicyRun(config, context, stage.manifest, learner, algorithm, players, first_routing_step(config, init_from))
    if point is not None:
        run.restore(point.folder, point.manifest.position)
    return run


def make_algorithm(
    config: Config, context: RankContext, players: Players, manifest: DataManifest
) -> tuple[Algorithm[Any], ValueHead | None]:
    """What `rlhf.algorithm` names, with a value head where it needs one."""
    rlhf = config.rlhf
    if rlhf.algorithm == "dpo":
        return DPO(config, players.pairs.train, players.reference, manifest.pad_id, context), None
    if rlhf.algorithm == "grpo":
        return GRPO(rlhf), None
    return PPO(rlhf), ValueHead(config.model.hidden_size, make_generator(config.training.seed, HEADS))


def _pairs(stage: Stage, policy: Transformer) -> PairSplit:
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


def _reward_model(stage: Stage, policy: Transformer, pairs: PairSplit) -> RewardModel:
    """The reward model of the run's folder; trained, and kept there, where it has none."""
    path = stage.folder.path / REWARD_MODEL
    if not on_main(stage.context, path.exists):
        model = RewardTrainer(stage.config, policy, stage.manifest.pad_id, stage.context).fit(
            pairs, _reward_progress(stage)
        )
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


def _answers(stage: Stage, before: Transformer, after: Transformer) -> dict[str, float]:
    """Harm in the answers of both models, where there is somebody to judge it."""
    is_judged = before.harm_head is not None or stage.config.constitutional.judge != "harm_head"
    return measure_answers(stage, before, after) if is_judged else {}


def _finish(stage: Stage, run: PolicyRun) -> StageResult:
    """Keeps the last policy under the KL bound, measures it and writes it out."""
    config, context, rlhf = stage.config, stage.context, stage.config.rlhf
    _, measure = run.draw()
    if measure.kl > rlhf.target_kl:
        logger.warning(
            "after %d rounds the KL of %.2f nats passes rlhf.target_kl=%g; the policy of %d rounds is kept",
            run.position.step,
            measure.kl,
            rlhf.target_kl,
            run.accepted_round,
        )
        run.return_to_accepted()
        measure = run.accepted_measure
    loss = held_out_loss(stage, run.learner)
    policy = run.learner.whole_trunk()

    def write() -> StageResult:
        samples = held_out_samples(config, stage.manifest, stage.tokenizer, run.players, policy)
        line = {
            **measured_line(measure),
            "rlhf/heldout_reward": samples.reward_after,
            "rlhf/heldout_reward_before": samples.reward_before,
            "rlhf/accepted_round": run.accepted_round,
            "val/loss": loss,
            **_answers(stage, run.players.reference, policy),
        }
        MetricsWriter(stage.folder.metrics_file).write(run.position.step, {"tokens": run.position.tokens, **line})
        write_atomically(
            stage.folder.samples_file, json.dumps(samples.samples, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
        save_model(policy, stage.manifest.tokenizer_folder, stage.folder.final_model, config)
        logger.info("wrote %s", stage.folder.final_model)
        return write_result(stage, run.position.step, run.position.tokens)

    return on_main(context, write)
