"""The alignment stage: preference pairs, a reward model, and a policy that learns from them."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

from ultrathink_model.alignment.dpo import DPO
from ultrathink_model.alignment.draws import HEADS, make_generator
from ultrathink_model.alignment.experience import Algorithm
from ultrathink_model.alignment.grpo import GRPO
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.policy_run import Players, PolicyRun
from ultrathink_model.alignment.ppo import PPO, ValueHead
from ultrathink_model.alignment.reward_stage import adopt_rewards, settle_pairs, settle_reward_model
from ultrathink_model.alignment.rewards import make_rewards
from ultrathink_model.alignment.rounds import improve, measured_line
from ultrathink_model.alignment.safety_answers import measure_answers
from ultrathink_model.alignment.samples import held_out_samples
from ultrathink_model.alignment.stage import Stage, held_out_loss, run_in_folder, write_result
from ultrathink_model.alignment.starting_model import (
    aligned_config,
    check_alignment,
    first_routing_step,
    starting_model,
)
from ultrathink_model.config import Config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.distributed.context import RankContext, init_distributed
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.run_folder import write_atomically
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.resume import ResumePoint
from ultrathink_model.training.session import ALONE, StagePlace, on_main

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

    def work(stage: Stage, point: ResumePoint | None) -> StageResult:
        run = _prepare(stage, init_from, point)
        improve(stage, run, place)
        return _finish(stage, run)

    rollouts = config.rlhf.ppo_batch_size * config.rlhf.rlhf_steps_per_iteration
    return run_in_folder(config, context, manifest, run_name, init_from, place, rollouts, work)


def _prepare(stage: Stage, init_from: Path, point: ResumePoint | None) -> PolicyRun:
    """The run at its first round or after a checkpoint; pairs and reward model are made where they are missing."""
    config, context = stage.config, stage.context
    policy = starting_model(config, init_from).to(context.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    adopt_rewards(stage)
    pairs = settle_pairs(stage, policy)
    learnt = settle_reward_model(stage, policy, pairs) if config.rlhf.needs_reward_model else None
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
