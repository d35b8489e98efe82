"""The stage of Constitutional AI: answers are criticised and revised, the model is tuned, preferences are labelled."""

import copy
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ultrathink_model.alignment.constitution import load_constitution, question_text
from ultrathink_model.alignment.critic import SelfCritic, make_critic
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.revision import Choice, Record, Revision, choose, red_team_prompts, revise
from ultrathink_model.alignment.revision_tuning import tune
from ultrathink_model.alignment.safety_answers import measure_answers
from ultrathink_model.alignment.stage import Stage, held_out_loss, write_result
from ultrathink_model.alignment.starting_model import (
    aligned_config,
    check_model_use,
    first_routing_step,
    starting_model,
)
from ultrathink_model.config import Config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import init_distributed
from ultrathink_model.errors import ConfigError, CriticError
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.resume import claim_folder
from ultrathink_model.training.rng import repeatable_kernels, seed_generators
from ultrathink_model.training.session import ALONE, StagePlace, mlflow_run, noted_ending
from ultrathink_model.training.signals import StopSignals

TUNING_FILE = "tuning.json"

logger = logging.getLogger(__name__)


class Tuning(BaseModel):
    """The content of `tuning.json`: that `final_model/` is tuned on the revisions, and how that went."""

    model_config = ConfigDict(frozen=True)

    steps: int
    tokens: int
    loss: float


def constitute(
    config: Config, *, manifest: DataManifest, run_name: str, init_from: Path | None, place: StagePlace = ALONE
) -> StageResult:
    """Constitutional AI on a trained model (Bai et al. 2022, arXiv 2212.08073).

    The model answers red-team prompts; the critic finds fault with each answer by a principle of the constitution and
    revises it; the model is tuned on the revisions. Then the critic chooses between two answers of the tuned model to
    each prompt. `final_model/` is the tuned model, and `preferences.jsonl` the choices, from which an RLHF stage makes
    a reward model. `revisions.jsonl` and `choices.jsonl` keep every word. Ours differs in the critic, which need not
    be the model itself, and in asking for each choice in both orders.

    The same call again goes on after the last batch of prompts that was kept (`training.resume: auto`).

    Args:
        config: The run; its architecture gives way to that of the model.
        manifest: Prepared data, with the model's tokenizer.
        run_name: Its name, in MLflow too.
        init_from: The model folder that is started from.
        place: Where the stage stands in its pipeline.

    Raises:
        ConfigError: There are several ranks, or no model to start from.
        CriticError: The critic cannot be asked, or no answer of it can be used.
        TrainingStoppedError: A signal came; what was answered is saved.
    """
    context = init_distributed(config)
    if context.world_size > 1:
        raise ConfigError(
            f"constitutional.enabled=true runs in one process, and there are {context.world_size}; start it without "
            "torchrun and with distributed.enabled=false"
        )
    config = aligned_config(config, init_from)
    assert init_from is not None, "aligned_config refuses None"
    check_model_use(config, manifest, init_from)
    folder = RunFolder(config.output.output_dir)
    with StopSignals() as signals, repeatable_kernels(config.training.deterministic):
        claim = claim_folder(config, manifest, folder, run_name, init_from, config.constitutional.sft_batch_size)
        if claim.result is not None:
            logger.info("%s is finished already", run_name)
            return claim.result
        with noted_ending(config, context, folder), mlflow_run(config, folder, run_name, place):
            tokenizer = Tokenizer.load(manifest.tokenizer_folder)
            stage = Stage(config, context, manifest, tokenizer, folder, run_name, signals)
            seed_generators(config.training.seed, 0)
            return _run(stage, init_from)


def _run(stage: Stage, init_from: Path) -> StageResult:
    config, context, tokenizer = stage.config, stage.context, stage.tokenizer
    constitution = load_constitution(config.constitutional.constitution)
    prompts = red_team_prompts(config)
    first = starting_model(config, init_from).to(context.device)
    model = SelfCritic(config, first, tokenizer)
    critic = model if config.constitutional.critic == "self" else make_critic(config, first, tokenizer)
    revisions = _all_of(
        Revision,
        stage.folder.revisions_file,
        len(prompts),
        functools.partial(revise, prompts, model=model, critic=critic, constitution=constitution, config=config),
        stage,
    )
    tuned, tuning = _tuned(stage, first, revisions, first_routing_step(config, init_from))
    metrics = {
        "constitutional/prompts": float(len(prompts)),
        "constitutional/revised": float(sum(revision.is_usable for revision in revisions)),
        "constitutional/tuning_loss": tuning.loss,
    }
    if config.constitutional.label_preferences:
        # The model was tuned to answer better, not to judge better: it is still its first state that chooses.
        choices = _all_of(
            Choice,
            stage.folder.choices_file,
            len(prompts),
            functools.partial(
                choose,
                prompts,
                model=SelfCritic(config, tuned, tokenizer),
                critic=critic,
                constitution=constitution,
                config=config,
            ),
            stage,
        )
        metrics["constitutional/preferences"] = float(_write_preferences(stage, choices))
    metrics |= measure_answers(stage, first, tuned)
    learner = Learner(config, context, tuned, None, config.constitutional.sft_learning_rate, 0.0)
    metrics["val/loss"] = held_out_loss(stage, learner)
    MetricsWriter(stage.folder.metrics_file).write(tuning.steps, {"tokens": tuning.tokens, **metrics})
    return write_result(stage, tuning.steps, tuning.tokens)


def _all_of(kind: type[Record], path: Path, count: int, work: Callable[..., None], stage: Stage) -> list[Record]:
    """The records of a file, one for each prompt; those that are missing are made, and kept as they are made."""
    known = {record.number: record for record in _read(kind, path)}
    missing = [number for number in range(count) if number not in known]

    def keep(done: list[Record]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{record.model_dump_json()}\n" for record in done)
        known.update((record.number, record) for record in done)
        logger.info("%s: %d of %d", path.name, len(known), count)
        if stage.is_asked_to_stop():
            stage.stop(f"with {len(known)} of {count} lines of {path.name}")

    if missing:
        work(numbers=missing, keep=keep)
    return [known[number] for number in range(count)]


def _read(kind: type[Record], path: Path) -> list[Record]:
    """The whole lines of a file; the last one may have been cut short by a kill, and is taken off."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    records = [kind.model_validate_json(line) for line in whole.split(b"\n") if line]
    write_atomically(path, "".join(f"{record.model_dump_json()}\n" for record in records))
    return records


def _tuned(
    stage: Stage, first: Transformer, revisions: list[Revision], routing_step: int
) -> tuple[Transformer, Tuning]:
    """The model tuned on the revisions: that of the run's folder, or tuned now and kept there."""
    config, context, folder = stage.config, stage.context, stage.folder
    record = folder.path / TUNING_FILE
    if record.exists():
        return load_model(folder.final_model, context.device).eval(), Tuning.model_validate_json(record.read_bytes())
    texts = [(question_text(item.prompt), item.turns[-1].revision) for item in revisions if item.is_usable]
    if not texts:
        raise CriticError(
            f"none of the {len(revisions)} revisions in {folder.revisions_file} can be used, so there is nothing to learn; "
            "take another critic, or raise constitutional.response_tokens. Then start with training.resume=never"
        )
    writer = MetricsWriter(folder.metrics_file)
    writer.truncate_after(-1)
    rate = config.constitutional.sft_learning_rate
    learner = Learner(config, context, copy.deepcopy(first), None, rate, 0.0)
    last = [0, 0.0]

    def after_step(step: int, steps: int, loss: float) -> None:
        if stage.is_asked_to_stop():
            stage.stop("while it was tuned on revisions, which begins anew then; the revisions are saved")
        last[:] = step, loss
        if step % config.logging.log_steps == 0 or step in (1, steps):
            writer.write(step, {"train/loss": loss})
            logger.info("tuning on revisions: step %d/%d, loss %.4f", step, steps, loss)

    tokens = tune(learner, texts, stage.tokenizer, config, routing_step, after_step)
    tuning = Tuning(steps=int(last[0]), tokens=tokens, loss=last[1])
    save_model(learner.whole_trunk(), stage.manifest.tokenizer_folder, folder.final_model, config)
    write_atomically(record, tuning.model_dump_json(indent=2) + "\n")
    return learner.whole_trunk().eval(), tuning


def _write_preferences(stage: Stage, choices: list[Choice]) -> int:
    """Writes what `rlhf.preference_data` reads; returns the number of pairs."""
    pairs = [pair for choice in choices if (pair := choice.as_pair())]
    lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs]
    write_atomically(stage.folder.preferences_file, "".join(f"{line}\n" for line in lines))
    logger.info("%d of %d choices make a preference pair", len(pairs), len(choices))
    if len(pairs) < 2:
        logger.warning(
            "the critic has next to no preferences, from which no reward model can learn; take another critic, give RLHF "
            "rlhf.preference_data of its own, or set constitutional.label_preferences=false"
        )
    return len(pairs)
