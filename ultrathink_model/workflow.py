"""The workflows as plans: the steps of each, in order, and the config and folder of every step.

Nothing here runs anything or imports torch: a mistake in the config is found before the first import that takes
seconds, and both command lines and ZenML work from the same plan.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from ultrathink_model.config import Config, load_config
from ultrathink_model.config.constitutional import ConstitutionalConfig
from ultrathink_model.config.data import DataConfig
from ultrathink_model.config.export import ExportConfig, check_formats
from ultrathink_model.config.gates import read_gates
from ultrathink_model.config.model import DREConfig, MoEConfig
from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.config.profiles import profile_path, resolve_profile
from ultrathink_model.config.promotion import PromotionConfig
from ultrathink_model.config.rlhf import RLHFConfig
from ultrathink_model.errors import ConfigError
from ultrathink_model.evaluation.task_files import check_inputs

STAGE_PREFIX = re.compile(r"(\w+):(.+)", re.DOTALL)


class Stage(NamedTuple):
    """One stage of a workflow: what it changes in the config of the run.

    Attributes:
        defaults: Overrides that the user's own overrides win over.
        fixed: Overrides that make the stage what it is; only `stage:section.key=value` wins over them.
        media: More defaults for a multimodal run on the built-in text, which has neither images nor sound.
    """

    name: str
    defaults: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    media: tuple[str, ...] = ()


class Workflow(NamedTuple):
    """The stages that train, and the other steps of a workflow, by name and in order."""

    stages: tuple[Stage, ...]
    steps: tuple[str, ...]


DENSE = ("advanced.enable_moe=false", "advanced.enable_dre=false", "advanced.enable_constitutional=false")
ADVANCED = ("advanced.enable_moe=true", "advanced.enable_dre=true")
PRETRAINS = ("advanced.enable_rlhf=false", "constitutional.enabled=false")
# Alignment's ranks write answers of their own.
UNCUT = ("distributed.tensor_parallel_size=1", "distributed.expert_parallel_size=1")
ONE_PROCESS = ("distributed.enabled=false", "distributed.strategy=null", "distributed.deepspeed_config=null", *UNCUT)
# What there is to see and to hear, and more sequences. At the profile's rates a decoder of six layers learns the text
# alone: it does not begin to look within 400 steps (docs/log.md).
WITH_DIGITS = (
    "data.mix_datasets=sotu:0.25,digits:0.75",
    "data.train_samples=3200",
    "training.muon_learning_rate=0.005",
    "training.learning_rate=1e-3",
)
# The stages that a workflow has only with Constitutional AI, and with a reward model of preference pairs.
CONSTITUTIONAL = "constitutional"
# The steps that read the section `promotion`.
PROMOTING = ("gate", "promote")
REWARD = "reward"
CONDITIONS = {
    CONSTITUTIONAL: "advanced.enable_constitutional=true or constitutional.enabled=true; add one of them",
    REWARD: "a reward of kind preferences; add one to rlhf.rewards, or set rlhf.rewards=null",
}
# What a reward model depends on; a change of the others leaves it valid.
REWARD_KEYS = ("preference_data", "num_pairs", "holdout_fraction", "prompt_tokens", "response_tokens")

WORKFLOWS = {
    "prototype": Workflow(
        stages=(
            Stage(
                "check",
                defaults=(*DENSE, "training.max_steps=20", "data.train_samples=1000", "evaluation.eval_samples=32"),
                fixed=(
                    *PRETRAINS,
                    "data.dataset=dummy",
                    "data.dataset_config=null",
                    "data.text_column=null",
                    "data.mix_datasets=null",
                    "data.streaming=false",
                ),
            ),
            Stage("pretrain", defaults=("training.num_epochs=1",), fixed=PRETRAINS, media=WITH_DIGITS),
        ),
        steps=("prepare_dummy", "check", "prepare_data", "pretrain", "evaluate_pretrain", "export", "report"),
    ),
    "production": Workflow(
        stages=(
            Stage("baseline", defaults=DENSE, fixed=PRETRAINS),
            Stage("advanced", defaults=ADVANCED, fixed=PRETRAINS),
            Stage(
                CONSTITUTIONAL,
                defaults=ADVANCED,
                fixed=("advanced.enable_rlhf=false", "constitutional.enabled=true", *ONE_PROCESS),
            ),
            Stage(
                REWARD,
                defaults=ADVANCED,
                fixed=(
                    "constitutional.enabled=false",
                    "advanced.enable_rlhf=true",
                    "rlhf.only_reward_model=true",
                    *UNCUT,
                ),
            ),
            Stage(
                "rlhf",
                defaults=ADVANCED,
                fixed=(
                    "constitutional.enabled=false",
                    "advanced.enable_rlhf=true",
                    "training.learning_rate=1.0e-5",
                    *UNCUT,
                ),
            ),
        ),
        steps=(
            "prepare_data",
            "baseline",
            "advanced",
            CONSTITUTIONAL,
            REWARD,
            "rlhf",
            "evaluate_baseline",
            "evaluate_advanced",
            f"evaluate_{CONSTITUTIONAL}",
            "evaluate_rlhf",
            "gate",
            "export",
            "report",
            "promote",
        ),
    ),
    "multi_gpu": Workflow(
        stages=(Stage("pretrain", fixed=(*PRETRAINS, "distributed.enabled=true")),),
        steps=("prepare_data", "pretrain", "evaluate_pretrain", "export", "report"),
    ),
}


class StepPlan(BaseModel):
    """What one step of a workflow is to do: the whole of its input beside the references of the steps before it.

    Attributes:
        name: The step's name in the workflow.
        number: Its place, counted from 1.
        of: Number of steps in the workflow.
        folder: Where the workflow writes.
        remote: Where that folder is kept for the machines of the other steps; None where all steps share a disk.
        inputs: Signature of the local files that the config names: another one where such a file has changed.
        config: The config of the step; a training stage's `output.output_dir` is its run's folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    number: int
    of: int
    folder: str
    remote: str | None = None
    inputs: str
    config: Config

    @property
    def has_own_machine(self) -> bool:
        """Whether the step runs on a machine of its own, below the folder that it starts in."""
        return not Path(self.folder).is_absolute()

    @property
    def title(self) -> str:
        """The step as the progress lines name it."""
        return f"stage {self.number}/{self.of} {self.name}"


class WorkflowPlan(BaseModel):
    """A workflow, ready to be wired."""

    model_config = ConfigDict(frozen=True)

    workflow: str
    reason: str
    config: Config
    folder: Path
    remote: str | None
    steps: dict[str, StepPlan]

    def __getitem__(self, step: str) -> StepPlan:
        return self.steps[step]


def plan_workflow(
    workflow: str,
    profile: str | None = None,
    config: str | None = None,
    overrides: Iterable[str] = (),
    remote_root: str | None = None,
) -> WorkflowPlan:
    """The plan of a workflow from a profile or a config file.

    Args:
        workflow: `prototype`, `production` or `multi_gpu`.
        profile: `auto`, `tiny`, `small`, `medium` or `large`; None with no `config` is `auto`.
        config: A config file in place of a profile's.
        overrides: Each `section.key=value`, or `stage:section.key=value` for one stage alone.
        remote_root: A store for the runs' folders, where each step has a machine of its own.

    Raises:
        ConfigError: No such workflow, profile, file, stage or key; a value that breaks a rule; both a profile and a
            file were given.
    """
    if workflow not in WORKFLOWS:
        raise ConfigError(f"--workflow {workflow} does not exist; take one of {', '.join(WORKFLOWS)}.")
    if config and profile:
        raise ConfigError(f"--profile {profile} and --config {config} were both given; take one of them.")
    if config:
        path, reason = Path(config), f"config {config}"
    else:
        choice = resolve_profile(profile or "auto")
        path, reason = profile_path(choice.profile), choice.reason
    general, by_stage = _split_overrides(overrides, WORKFLOWS[workflow].stages)
    base = load_config(path, general)
    stages, names = _needed(workflow, base)
    if _lacks_media(base) and any(stage.media for stage in stages):
        stages = [stage._replace(defaults=(*stage.defaults, *stage.media)) for stage in stages]
        reason += f"; {base.data.dataset} has neither images nor sound, so `digits` is mixed in"
    for stage, rule in CONDITIONS.items():
        if by_stage.get(stage) and stage not in names:
            raise ConfigError(f"--override {stage}:{by_stage[stage][0]}: the workflow has that stage only with {rule}.")
    folder, remote = _places(base, workflow, remote_root)
    configs = {
        stage.name: _stage_config(path, stage, general, by_stage[stage.name], folder, remote) for stage in stages
    }
    for evaluated in configs.values():
        check_inputs(evaluated.evaluation)
    if "gate" in names:
        read_gates(configs[stage_of(workflow, "gate")].promotion.gates_file)
    steps = {}
    for number, name in enumerate(names, start=1):
        step_config = _as_read_by(name, configs[stage_of(workflow, name)], trains=name in configs)
        steps[name] = StepPlan(
            name=name,
            number=number,
            of=len(names),
            folder=str(folder),
            remote=remote,
            inputs=input_signature(step_config),
            config=step_config,
        )
    return WorkflowPlan(workflow=workflow, reason=reason, config=base, folder=folder, remote=remote, steps=steps)


def _places(base: Config, workflow: str, remote_root: str | None) -> tuple[Path, str | None]:
    """The folder of a workflow, and where it is kept for other machines.

    On machines of their own the steps write below the folder that they start in: this machine's paths are not theirs.
    """
    given = Path(base.output.output_dir)
    remote = base.output.remote_dir
    if remote_root is None:
        return given.resolve() / workflow, f"{remote.rstrip('/')}/{workflow}" if remote else None
    place = Path("outputs") / given.name if given.is_absolute() or ".." in given.parts else given
    return place / workflow, f"{(remote or f'{remote_root}/{place.as_posix()}').rstrip('/')}/{workflow}"


def _as_read_by(step: str, config: Config, trains: bool) -> Config:
    """A stage's config as one of its steps reads it: what the step does not read takes its defaults.

    So what was trained stays valid when a gate moves, the finished model is measured in another way, or exported.
    """
    changes: dict[str, object] = {}
    if not trains:
        changes["training"] = config.training.model_copy(update={"resume": "auto"})
    if step not in PROMOTING:
        changes["promotion"] = PromotionConfig()
    if not step.startswith("evaluate_"):
        changes["evaluation"] = config.evaluation.while_training()
    if step == "export":
        check_formats(config)
    else:
        changes["export"] = ExportConfig()
    return config.model_copy(update=changes)


def _needed(workflow: str, base: Config) -> tuple[list[Stage], list[str]]:
    """The stages and steps of a workflow that its config asks for."""
    left_out = set()
    if not (base.constitutional.enabled or base.advanced.enable_constitutional):
        left_out.add(CONSTITUTIONAL)
    if not base.rlhf.needs_reward_model:
        left_out.add(REWARD)
    found = WORKFLOWS[workflow]
    stages = [stage for stage in found.stages if stage.name not in left_out]
    return stages, [name for name in found.steps if name.removeprefix("evaluate_") not in left_out]


def stage_of(workflow: str, step: str) -> str:
    """The training stage whose config a step works by: its own, or the last one's for export and report."""
    stages = [stage.name for stage in WORKFLOWS[workflow].stages]
    if step in stages:
        return step
    if step.startswith("evaluate_"):
        return step.removeprefix("evaluate_")
    if step == "prepare_dummy":
        return "check"
    if step == "prepare_data":
        # Data are prepared once, for the first stage that learns from them.
        return next(stage for stage in stages if stage != "check")
    return stages[-1]


def input_signature(config: Config) -> str:
    """SHA-256 over name, size and time of every local file that the config names as an input."""
    sources = config.data.mix_datasets
    names = [config.data.dataset, config.data.tokenizer_name]
    if isinstance(sources, str):
        names += [source.rpartition(":")[0] or source for source in sources.split(",")]
    elif sources:
        names += [source.dataset for source in sources]
    constitutional = config.constitutional
    single = [config.rlhf.preference_data, config.distributed.deepspeed_config, constitutional.constitution]
    single += [constitutional.safety_data, constitutional.red_team_data]
    single += [constitutional.critic_model] if constitutional.critic == "local" else []
    single += [reward.source for reward in config.rlhf.rewards or [] if reward.kind != "callable"]
    single += [config.evaluation.blimp, *config.evaluation.tasks]
    if config.advanced.enable_multimodal:
        single += [config.multimodal.image_encoder, config.multimodal.audio_encoder]
        # Rows name media by paths below the folder of their own file.
        single += [str(Path(name).parent) for name in names if Path(name).is_file()]
    names += [name for name in single if name]
    digest = hashlib.sha256()
    for path in sorted({file for name in names for file in _local_files(name)}):
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def plan_hash(plan: StepPlan) -> str:
    """SHA-256 of what a plan computes: all of its config but how it is logged."""
    values = plan.config.model_dump(mode="json", exclude={"logging"})
    return hashlib.sha256(json.dumps([values, plan.inputs], sort_keys=True).encode()).hexdigest()


def _split_overrides(overrides: Iterable[str], stages: tuple[Stage, ...]) -> tuple[list[str], dict[str, list[str]]]:
    general: list[str] = []
    by_stage: dict[str, list[str]] = {stage.name: [] for stage in stages}
    for override in overrides:
        match = STAGE_PREFIX.fullmatch(override)
        if match is None:
            general.append(override)
        elif match[1] in by_stage:
            by_stage[match[1]].append(match[2])
        else:
            raise ConfigError(
                f"--override {override}: the workflow has no stage {match[1]}; its stages are {', '.join(by_stage)}."
            )
    return general, by_stage


def _lacks_media(config: Config) -> bool:
    """Whether a multimodal run's data were left at the built-in text that every profile names."""
    is_default = config.data.mix_datasets is None and config.data.dataset == DataConfig().dataset
    return config.advanced.enable_multimodal and is_default


def _stage_config(
    path: Path, stage: Stage, general: list[str], own: list[str], folder: Path, remote: str | None
) -> Config:
    config = load_config(path, [*stage.defaults, *general, *stage.fixed, *own])
    unused: dict[str, object] = {}
    # A section that a stage does not use takes its defaults, so that tuning one stage leaves the others' results valid.
    if not config.advanced.enable_moe:
        unused["moe"] = MoEConfig()
    if not config.advanced.enable_dre:
        unused["dre"] = DREConfig()
        unused["advanced"] = config.advanced.model_copy(update={"dre_warmup_steps": 0})
    if not config.advanced.enable_rlhf:
        unused["rlhf"] = RLHFConfig()
    elif config.rlhf.only_reward_model:
        unused["rlhf"] = _rewards_alone(config.rlhf)
    if not (config.advanced.enable_constitutional or config.constitutional.enabled):
        unused["constitutional"] = ConstitutionalConfig()
    places = {"output_dir": str(folder / stage.name), "remote_dir": f"{remote}/{stage.name}" if remote else None}
    if not config.advanced.enable_multimodal:
        unused["multimodal"] = MultimodalConfig()
    output = config.output.model_copy(update=places)
    return config.model_copy(update={"output": output, **unused})


def _rewards_alone(rlhf: RLHFConfig) -> RLHFConfig:
    """The section with what its reward model does not depend on at its defaults."""
    names = [name for name in RLHFConfig.model_fields if name in REWARD_KEYS or name.startswith("reward_")]
    return RLHFConfig(only_reward_model=True, **{name: getattr(rlhf, name) for name in names})


def _local_files(name: str) -> list[Path]:
    """Files that a value of the config stands for: a file, a folder's files, or what a glob matches."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    if glob.has_magic(name):
        return [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    return []
