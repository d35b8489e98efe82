"""Run settings of a stack: machines, images, retries, spot and timeouts for each step, checked and put into ZenML's words.

ZenML passes over a misspelled step or a foreign setting with a warning at most; here each is an error.
"""

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from zenml.config.docker_settings import DockerSettings
from zenml.config.retry_config import StepRetryConfig

from pipelines.stack_files import SECRET_NAME, STACK_PREFIX
from ultrathink_model.config.yaml_text import read_yaml
from ultrathink_model.errors import ConfigError
from ultrathink_model.workflow import WORKFLOWS

FOLDER = Path(__file__).resolve().parents[1] / "stack_configs" / "run_settings"
HOUR = 3600
# How long a spot job may wait for a machine, in hours, over and above its running time.
SPOT_WAIT_HOURS = 24
# SageMaker sells GPUs with the machine; these are the ones that the shipped settings name.
SAGEMAKER_GPUS = {
    "ml.g5.2xlarge": 1, "ml.g5.12xlarge": 4, "ml.g5.48xlarge": 8, "ml.p3.8xlarge": 4, "ml.p3.16xlarge": 8,
    "ml.p4d.24xlarge": 8, "ml.p5.48xlarge": 8,
}  # fmt: skip


class StepSettings(BaseModel):
    """How a step is run; what is left out comes from `defaults`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str | None = Field(None, description="The cloud's name of the machine: ml.g5.2xlarge, g2-standard-12.")
    gpu_type: str | None = Field(None, description="Vertex AI's name of the accelerator: NVIDIA_L4.")
    gpus: int = Field(0, ge=0, le=16, description="Accelerators of the step.")
    cpus: float | None = Field(None, gt=0, description="Cores that a pod asks for.")
    memory_gb: float | None = Field(None, gt=0, description="Memory that a pod asks for.")
    disk_gb: int | None = Field(None, ge=10, le=16384, description="Disk of the step's machine.")
    timeout_hours: float | None = Field(None, gt=0, le=672, description="The step is ended after this time.")
    spot: bool = Field(False, description="Take a machine that the cloud may take back; the step resumes elsewhere.")
    node_labels: dict[str, str] = Field({}, description="Labels of the nodes that a pod may run on.")
    retries: int = Field(0, ge=0, le=20, description="Times that the step is tried again.")
    retry_delay_seconds: int = Field(30, ge=0, description="Wait before the first of them.")
    retry_backoff: int = Field(2, ge=1, description="Factor on the wait after each.")


class RunSettings(BaseModel):
    """The content of `stack_configs/run_settings/<stack>.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str | None = Field(None, description="A ready image for every step; null builds ours from the Dockerfile.")
    environment: dict[str, str] = Field({}, description="Variables of every step; never secrets.")
    defaults: StepSettings = StepSettings()
    steps: dict[str, StepSettings] = Field(
        {}, description="By step, or by a pattern as in evaluate_*; the last one wins."
    )

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if SECRET_NAME.search(name):
                raise ValueError(f"{name} is a secret; give it to the stack: zenml stack update STACK --secret NAME")
        return value

    @field_validator("steps")
    @classmethod
    def _steps_exist(cls, value: dict[str, StepSettings]) -> dict[str, StepSettings]:
        names = sorted({name for workflow in WORKFLOWS.values() for name in workflow.steps})
        for pattern in value:
            if not fnmatch.filter(names, pattern):
                near = difflib.get_close_matches(pattern, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(names)}"
                raise ValueError(f"no workflow has a step {pattern}; {hint}")
        return value

    def of(self, step: str) -> StepSettings:
        """The settings of one step: the defaults, and each matching pattern on top of them."""
        values = self.defaults.model_dump(exclude_unset=True)
        for pattern, settings in self.steps.items():
            if fnmatch.fnmatchcase(step, pattern):
                values |= settings.model_dump(exclude_unset=True)
        return StepSettings(**values)


def read_run_settings(path: Path) -> RunSettings:
    """Reads a file of run settings.

    Raises:
        ConfigError: It cannot be read, or a key or value in it breaks a rule.
    """
    try:
        return RunSettings.model_validate(read_yaml(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise ConfigError(f"--run-settings {path}: {error.strerror}. Shipped ones lie in {FOLDER}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place, known = [str(part) for part in first["loc"]], {**StepSettings.model_fields, **RunSettings.model_fields}
        near = difflib.get_close_matches(place[-1], list(known), n=1) if first["type"] == "extra_forbidden" else []
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: {'.'.join(place)}: {first['msg'].removeprefix('Value error, ')}.{hint}") from None


def find_run_settings(stack: str) -> RunSettings:
    """The shipped settings of a stack, by its name with or without `ultrathink_`; none for stacks of the user's own."""
    path = FOLDER / f"{stack.removeprefix(STACK_PREFIX)}.yaml"
    return read_run_settings(path) if path.exists() else RunSettings()


def to_zenml(settings: RunSettings, flavor: str, steps: Iterable[str]) -> dict[str, Any]:
    """Run settings as what `Pipeline.with_options` takes.

    Args:
        settings: The run settings.
        flavor: Flavor of the stack's orchestrator.
        steps: Names of the workflow's steps.

    Raises:
        ConfigError: The orchestrator cannot do what the settings ask for.
    """
    translate = ORCHESTRATORS.get(flavor)
    if translate is None:
        if settings == RunSettings():
            return {}
        raise ConfigError(f"run settings cannot be given to the orchestrator {flavor}; there is {_known()}.")
    by_step: dict[str, Any] = {}
    for name in steps:
        step = settings.of(name)
        options: dict[str, Any] = {}
        own = translate(name, step)
        if own:
            options["settings"] = {f"orchestrator.{flavor}": own}
        if step.retries:
            options["retry"] = StepRetryConfig(
                max_retries=step.retries, delay=step.retry_delay_seconds, backoff=step.retry_backoff
            )
        if options:
            by_step[name] = options
    result: dict[str, Any] = {"steps": by_step} if by_step else {}
    if flavor != "local":
        result["settings"] = {"docker": _docker(settings)}
    return result


def _docker(settings: RunSettings) -> DockerSettings:
    if settings.image:
        return DockerSettings(
            parent_image=settings.image,
            skip_build=True,
            # The image holds the code; what ZenML would fetch instead is this folder as it happens to be.
            allow_download_from_artifact_store=False,
            allow_download_from_code_repository=False,
            runtime_environment=settings.environment,
            install_stack_requirements=False,
        )
    root = str(FOLDER.parents[1])
    return DockerSettings(
        dockerfile=f"{root}/Dockerfile", build_context_root=root, runtime_environment=settings.environment
    )


def _local(name: str, step: StepSettings) -> dict[str, Any]:
    foreign = sorted(step.model_fields_set - {"retries", "retry_delay_seconds", "retry_backoff"})
    if foreign:
        raise ConfigError(
            f"steps.{name}.{foreign[0]}: the local orchestrator takes the machine as it is; leave it out."
        )
    return {}


def _sagemaker(name: str, step: StepSettings) -> dict[str, Any]:
    if step.machine is None or not step.machine.startswith("ml."):
        raise ConfigError(
            f"steps.{name}.machine={step.machine}: SageMaker's machines are named ml.…, as ml.g5.2xlarge."
        )
    for field in ("gpu_type", "cpus", "memory_gb", "node_labels"):
        if field in step.model_fields_set:
            raise ConfigError(f"steps.{name}.{field}: on SageMaker it comes with the machine; leave it out.")
    sold = SAGEMAKER_GPUS.get(step.machine, step.gpus)
    if sold != step.gpus:
        raise ConfigError(f"steps.{name}.gpus={step.gpus}: {step.machine} has {sold}; change one of them.")
    seconds = math.ceil((step.timeout_hours or 24) * HOUR)
    if seconds > 28 * 24 * HOUR:
        raise ConfigError(f"steps.{name}.timeout_hours={step.timeout_hours}: SageMaker ends jobs after 672 hours.")
    result: dict[str, Any] = {"instance_type": step.machine, "max_runtime_in_seconds": seconds}
    if step.disk_gb:
        result["volume_size_in_gb"] = step.disk_gb
    if step.spot:
        # A warm pool cannot be of spot machines.
        result["keep_alive_period_in_seconds"] = None
        result["estimator_args"] = {"use_spot_instances": True, "max_wait": seconds + SPOT_WAIT_HOURS * HOUR}
    return result


def _vertex(name: str, step: StepSettings) -> dict[str, Any]:
    if step.machine is None or bool(step.gpus) != bool(step.gpu_type):
        raise ConfigError(f"steps.{name}: Vertex AI needs machine, and gpus and gpu_type together or neither.")
    for field in ("cpus", "memory_gb", "node_labels"):
        if field in step.model_fields_set:
            raise ConfigError(f"steps.{name}.{field}: on Vertex AI it comes with the machine; leave it out.")
    job: dict[str, Any] = {"machine_type": step.machine, "accelerator_count": step.gpus}
    # Left out, or null, it would be the stack's: an L4 on a machine that takes none.
    job["accelerator_type"] = step.gpu_type or ""
    if step.disk_gb:
        job["boot_disk_size_gb"] = step.disk_gb
    extra: dict[str, Any] = {}
    if step.timeout_hours:
        extra["timeout"] = f"{math.ceil(step.timeout_hours * HOUR)}s"
    if step.spot:
        extra |= {"strategy": "SPOT", "restart_job_on_worker_restart": True}
    return {"custom_job_parameters": job | ({"additional_training_job_args": extra} if extra else {})}


def _kubernetes(name: str, step: StepSettings) -> dict[str, Any]:
    for field in ("machine", "gpu_type"):
        if field in step.model_fields_set:
            raise ConfigError(f"steps.{name}.{field}: on Kubernetes nodes are chosen by node_labels; leave it out.")
    if step.spot and not step.node_labels:
        raise ConfigError(f"steps.{name}.spot: name the label of the spot nodes in node_labels.")
    requests = {"cpu": step.cpus and f"{step.cpus:g}", "memory": step.memory_gb and f"{step.memory_gb:g}Gi"}
    requests["ephemeral-storage"] = step.disk_gb and f"{step.disk_gb}Gi"
    pod: dict[str, Any] = {"resources": {"requests": {key: value for key, value in requests.items() if value}}}
    if step.gpus:
        pod["resources"]["limits"] = {"nvidia.com/gpu": str(step.gpus)}
    if step.node_labels:
        pod["node_selectors"] = step.node_labels
    if step.spot:
        pod["tolerations"] = [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in step.node_labels.items()
        ]
    if step.timeout_hours:
        pod["additional_pod_spec_args"] = {"active_deadline_seconds": math.ceil(step.timeout_hours * HOUR)}
    return {"pod_settings": pod}


ORCHESTRATORS: dict[str, Callable[[str, StepSettings], dict[str, Any]]] = {
    "local": _local,
    "sagemaker": _sagemaker,
    "vertex": _vertex,
    "kubernetes": _kubernetes,
}


def _known() -> str:
    return ", ".join(ORCHESTRATORS)
