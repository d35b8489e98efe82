"""The rounds of an alignment stage, each with its line of metrics, its checkpoint and an ear for signals."""

import contextlib
import logging

from ultrathink_model.alignment.policy_run import Measure, PolicyRun
from ultrathink_model.alignment.reward_stage import record_line
from ultrathink_model.alignment.stage import Stage, save_position
from ultrathink_model.alignment.update import Update
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.progress import Progress
from ultrathink_model.training.session import StagePlace

logger = logging.getLogger(__name__)


def improve(stage: Stage, run: PolicyRun, place: StagePlace) -> None:
    """The rounds that are still to do, with a line of metrics and, where one is due, a checkpoint after each."""
    rlhf, context = stage.config.rlhf, stage.context
    writer = MetricsWriter(stage.folder.metrics_file) if context.is_main else None
    if writer:
        # The line of a round carries the number of rounds before it, the last line their full number.
        writer.truncate_after(run.position.step - 1)
    progress = _progress(stage, run, place)
    with progress or contextlib.nullcontext():
        while not run.is_done:
            rollout, measure = run.draw()
            if measure.kl > rlhf.target_kl and not run.can_return:
                logger.warning(
                    "round %d: KL %.2f passes rlhf.target_kl=%g, and rlhf.algorithm=%s has no way back: it ends here",
                    run.position.step,
                    measure.kl,
                    rlhf.target_kl,
                    rlhf.algorithm,
                )
                return
            parts = run.players.rewards.pop_parts()
            kl_weight = run.control.weight
            update = run.learn(rollout, measure)
            if writer:
                line = {**measured_line(measure), **parts, **_updated(update, kl_weight, run), **_once(run)}
                writer.write(run.position.step - 1, {"tokens": run.position.tokens, **line})
            if progress:
                progress.message(f"reward {measure.reward:+.3f}, KL {measure.kl:.2f} nats per response")
                progress.update(run.position.step)
            is_asked = stage.is_asked_to_stop()
            if is_asked or run.is_done or run.position.step % rlhf.rlhf_frequency == 0:
                save_round(stage, run)
            if is_asked:
                stage.stop(f"after round {run.position.step} of {rlhf.rlhf_iterations}, and saved")


def _progress(stage: Stage, run: PolicyRun, place: StagePlace) -> Progress | None:
    if not stage.context.is_main:
        return None
    return Progress(
        stage.run_name,
        stage.config.rlhf.rlhf_iterations,
        log_steps=stage.config.logging.log_steps,
        stage=place.number,
        stages=place.of,
        first_step=run.position.step,
    )


def measured_line(measure: Measure) -> dict[str, float]:
    return {
        "rlhf/reward": measure.reward,
        "rlhf/reward_spread": measure.reward_spread,
        "rlhf/kl": measure.kl,
        "rlhf/entropy": measure.entropy,
        "rlhf/response_tokens": measure.response_tokens,
    }


def _updated(update: Update, kl_weight: float, run: PolicyRun) -> dict[str, float]:
    parts = {f"rlhf/{name}": value for name, value in update.means.items()}
    weight = {"rlhf/kl_weight": kl_weight} if run.can_return else {}
    return {**parts, **weight, "rlhf/update_steps": update.steps, "rlhf/bad_steps": run.position.bad_steps}


def _once(run: PolicyRun) -> dict[str, float]:
    """The reward model's figures, on the line of the first round."""
    record = run.players.rewards.record
    if run.position.step > 1 or record is None:
        return {}
    return record_line(record)


def save_round(stage: Stage, run: PolicyRun) -> None:
    """Writes a checkpoint of the rounds that are done."""
    save_position(
        stage, run.position, run.tensors(), run.rank_state(), run.learner.strategy_name, run.responses_per_round
    )
