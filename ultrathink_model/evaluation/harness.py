"""Tasks of lm-eval: by name, from YAML files, or from JSONL files of questions, with their standard errors."""

import difflib
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ultrathink_model.config import Config
from ultrathink_model.config.evaluation import EvaluationConfig
from ultrathink_model.errors import ConfigError, DataError
from ultrathink_model.evaluation.task_files import jsonl_task, local_files, require_harness

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# What lm-eval raises for a task that names no data, data that cannot be had, or a template that does not fit them.
TASK_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError)


def task_metrics(folder: Path, config: Config, device: torch.device | str) -> dict[str, float]:
    """Runs `evaluation.tasks` on a model folder: `eval/<task>/<metric>` and, where there is one, `…_stderr`.

    Groups of tasks have their means under their own names. Nothing is asked of the network for local files.

    Args:
        folder: The model in Hugging Face format.
        config: `evaluation` says which tasks and how much of them, `training.seed` which examples are shown.
        device: Where the model runs.

    Raises:
        ConfigError: There is no such task or file.
        DataError: A task's data cannot be had or read.
        DependencyError: lm-eval is not installed.
    """
    require_harness()
    from lm_eval import simple_evaluate  # noqa: PLC0415 - seconds long, and only for those who ask

    # It warns of each default that it takes.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    settings = config.evaluation
    manager, specs = _tasks(settings, _generation_tokens(config))
    try:
        found = simple_evaluate(
            _language_model(folder, config, device),
            tasks=specs,
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.task_samples,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=config.training.seed,
            numpy_random_seed=config.training.seed,
            torch_random_seed=config.training.seed,
            fewshot_random_seed=config.training.seed,
        )
    except TASK_ERRORS as error:
        raise DataError(
            f"evaluation.tasks={settings.tasks}: lm-eval gave up: {type(error).__name__}: {' '.join(str(error).split())}. "
            "Without a network, name YAML or JSONL files whose data lie on this machine, or start in a folder that holds the "
            "task's data under the hub's name (Rowan/hellaswag/ for hellaswag)."
        ) from error
    assert found is not None, "there is one rank"
    metrics: dict[str, float] = {}
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        metrics |= _named(task, values)
    return metrics


def _tasks(settings: EvaluationConfig, generation_tokens: int) -> tuple["TaskManager", list[Any]]:
    """What lm-eval is to run, and the index that it finds it in; its own tasks take 17 s to index."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - see `task_metrics`

    files = {name: path for name in settings.tasks if (path := local_files(name)) is not None}
    folders = [str(path) for path in files.values() if path.is_dir()]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(settings.tasks))
    specs: list[Any] = []
    for name in settings.tasks:
        path = files.get(name)
        if path is None:
            specs.append(_known(name, manager))
        elif path.is_dir():
            specs += _tasks_of_folder(path, TaskManager(include_path=str(path), include_defaults=False))
        else:
            specs.append(str(path) if path.suffix in (".yaml", ".yml") else jsonl_task(path, generation_tokens))
    return manager, specs


def _known(name: str, manager: "TaskManager") -> str:
    if name not in manager.all_tasks:
        nearest = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(f"evaluation.tasks: lm-eval has no task {name}, and there is no such file.{hint}")
    return name


def _tasks_of_folder(folder: Path, manager: "TaskManager") -> list[str]:
    """The folder's groups, and its tasks that belong to none."""
    if not manager.all_tasks:
        raise ConfigError(f"evaluation.tasks: {folder} holds no YAML file of a task; name its file, or another folder.")
    return [*manager.all_groups] or manager.all_subtasks


def _generation_tokens(config: Config) -> int:
    """Most tokens that are generated after a prompt: `evaluation.generation_tokens`, and half of what the model reads at most."""
    return min(config.evaluation.generation_tokens, config.model.max_seq_length // 2)


def _language_model(folder: Path, config: Config, device: torch.device | str) -> Any:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - see `task_metrics`
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    import ultrathink_model.models.hf_auto  # noqa: F401, PLC0415 - our own architecture loads without remote code

    class Model(HFLM):
        """lm-eval asks for 256 tokens where a task names no number, which leaves a short context no room for a prompt."""

        max_gen_toks = min(256, config.model.max_seq_length // 2)

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return Model(
        pretrained=model.to(device).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=config.evaluation.batch_size,
        max_length=config.model.max_seq_length,
    )


def _named(task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `<metric>,<filter>` as our names; the filter is left out where the task has but one."""
    numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
    filters = {name.partition(",")[2] for name in numbers}
    metrics: dict[str, float] = {}
    for name, value in numbers.items():
        metric, _, chosen = name.partition(",")
        kind = "_stderr" if metric.endswith("_stderr") else ""
        metric = metric.removesuffix("_stderr") + (f"_{chosen}" if len(filters) > 1 else "") + kind
        if not kind or math.isfinite(value):
            metrics[f"eval/{_plain(task)}/{_plain(metric)}"] = float(value)
    return metrics


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
