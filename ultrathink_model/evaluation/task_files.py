"""Tasks that lie on this machine: YAML files of lm-eval, and JSONL files of questions, texts or prompts."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from ultrathink_model.config.evaluation import EvaluationConfig
from ultrathink_model.errors import ConfigError, DataError, DependencyError

SUFFIXES = (".yaml", ".yml", ".jsonl")
FORMS = (
    "{question, choices, answer} with the answer one of the choices or its number from 0, {prompt, answer}, or {text}"
)

Row = dict[str, Any]


def check_inputs(settings: EvaluationConfig) -> None:
    """Refuses, before a run begins, what its evaluation would trip over at the end.

    Raises:
        ConfigError: A file or folder of `evaluation.tasks` or `evaluation.blimp` does not exist.
        DataError: A JSONL task cannot be read.
        DependencyError: There are tasks, and lm-eval is not installed.
    """
    if settings.blimp is not None and not Path(settings.blimp).is_dir():
        raise ConfigError(
            f"evaluation.blimp={settings.blimp} is no folder; name the one that holds BLiMP's JSONL files."
        )
    if settings.tasks:
        require_harness()
    for name in settings.tasks:
        path = local_files(name)
        if path is not None and path.suffix == ".jsonl":
            read_rows(path)


def require_harness() -> None:
    """Makes sure that lm-eval is installed.

    Raises:
        DependencyError: It is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise DependencyError(
            "evaluation.tasks needs lm-eval, which is not installed: pip install 'ultrathink-model[evaluation]'; or set "
            "evaluation.tasks=[]."
        )


def local_files(name: str) -> Path | None:
    """The file or folder that an entry of `evaluation.tasks` names; None for a task of lm-eval's own.

    Raises:
        ConfigError: It is written as a path, and nothing is there or nothing that could be a task.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix in SUFFIXES):
        return path
    if path.exists() or "/" in name or path.suffix in SUFFIXES:
        state = "is no YAML or JSONL file" if path.exists() else "does not exist"
        raise ConfigError(
            f"evaluation.tasks: {name} {state}; name a task of lm-eval, a YAML file, a folder of them, or a JSONL file."
        )
    return None


def jsonl_task(path: Path, generation_tokens: int) -> dict[str, Any]:
    """lm-eval's description of the task that a JSONL file holds; its name is the file's.

    Multiple choice gives `acc` and `acc_norm` (by the choice's length in bytes), prompts `exact_match` of the first line
    that is generated, texts `bits_per_byte` and perplexities.

    Args:
        path: The file.
        generation_tokens: Most tokens that are generated after a prompt.

    Raises:
        DataError: A line is of no known form, or of another than the first.
    """
    rows = read_rows(path)
    task: dict[str, Any] = {"task": path.stem, "custom_dataset": _Rows(rows), "test_split": "test"}
    if "choices" in rows[0]:
        return task | {
            "output_type": "multiple_choice",
            "fewshot_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            # Where there is no question the choices are whole texts, which no blank comes before.
            "target_delimiter": " " if any(row["question"] for row in rows) else "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    if "prompt" in rows[0]:
        return task | {
            "output_type": "generate_until",
            "fewshot_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": generation_tokens},
            "filter_list": [
                {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [{"metric": "exact_match"}],
        }
    return task | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL task, with answers as numbers of choices.

    Raises:
        DataError: There are none, or a line is of no known form, or of another than the first.
    """
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = _row(json.loads(line), rows[0] if rows else None)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"evaluation.tasks: line {number} of {path} cannot be used: {error}. Each line is JSON of the form {FORMS}."
                ) from None
            rows.append(row)
    if not rows:
        raise DataError(f"evaluation.tasks: {path} is empty; each line is JSON of the form {FORMS}.")
    return rows


def _row(values: Row, first: Row | None) -> Row:
    if "choices" in values:
        choices, answer = [str(choice) for choice in values["choices"]], values["answer"]
        place = choices.index(answer) if isinstance(answer, str) else int(answer)
        if not 0 <= place < len(choices):
            raise ValueError(f"answer {place} is not among its {len(choices)} choices")
        row = {"question": str(values.get("question", "")), "choices": choices, "answer": place}
    elif "prompt" in values:
        row = {"prompt": str(values["prompt"]), "answer": str(values["answer"])}
    else:
        row = {"text": str(values["text"])}
        if not row["text"]:
            raise ValueError("its text is empty")
    if first is not None and row.keys() != first.keys():
        raise ValueError(f"it is of another form than the first, {{{', '.join(first)}}}")
    return row


class _Rows:
    """Rows as the data set that lm-eval asks a task for."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __call__(self, **_: object) -> dict[str, Any]:
        from datasets import Dataset  # noqa: PLC0415 - seconds long

        return {"test": Dataset.from_list(self._rows)}
