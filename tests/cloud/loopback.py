"""A cloud on loopback: a ZenML server that counts as remote, stand-ins for the cloud's services, machines that are folders."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from services import free_port, service

ROOT = Path(__file__).resolve().parents[2]

MARKS = [
    pytest.mark.slow,
    # The SDKs of the clouds and ZenML use what is deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
"""Of every test of a cloud."""

VALUES = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_seq_length": 32,
    },
    "moe": {
        "num_knowledge_experts": 4,
        "num_skill_experts": 2,
        "num_meta_experts": 1,
        "num_safety_experts": 1,
        "layer_frequency": 2,
    },
    "training": {"batch_size": 4, "max_steps": 4, "warmup_steps": 2, "learning_rate": 3e-3, "checkpoint_steps": 2},
    "rlhf": {
        "num_pairs": 16,
        "prompt_tokens": 8,
        "response_tokens": 8,
        "reward_epochs": 1,
        "reward_batch_size": 8,
        "rlhf_iterations": 1,
        "ppo_epochs": 1,
        "ppo_batch_size": 8,
        "ppo_minibatch_size": 4,
    },
    "data": {"dataset": "dummy", "tokenizer_name": "train", "train_samples": 64},
    "evaluation": {"num_generations": 1, "generation_tokens": 8, "eval_samples": 8},
    "logging": {"log_steps": 1, "system_metrics": False},
    "output": {"output_dir": "./outputs/small"},
}


def clean_environment() -> dict[str, str]:
    """This process's environment, less what it says of its own ZenML."""
    # Without Python's cache of bytecode each job would spend two thirds of its start on compiling the same packages.
    unwanted = ("ZENML_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}


@contextmanager
def zenml_server(folder: Path) -> Iterator[dict[str, str]]:
    """A ZenML server with a store of its own; yields what a client's environment needs to reach it."""
    port = free_port()
    (folder / "server").mkdir(parents=True)
    environment = clean_environment() | {
        "ZENML_SERVER": "true",
        "ZENML_CONFIG_PATH": str(folder / "server"),
        "ZENML_SERVER_AUTO_ACTIVATE": "true",
        "ZENML_SERVER_TELEMETRY_ENABLED": "false",
        "ZENML_ANALYTICS_OPT_IN": "false",
        "ZENML_DEFAULT_USER_PASSWORD": "loopback",
    }
    command = [sys.executable, "-m", "uvicorn", "zenml.zen_server.zen_server_api:app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    url = f"http://127.0.0.1:{port}"
    with service(command, f"{url}/health", folder / "zenml.log", environment):
        yield {
            "ZENML_STORE_URL": url,
            "ZENML_STORE_USERNAME": "default",
            "ZENML_STORE_PASSWORD": "loopback",
            "ZENML_CONFIG_PATH": str(folder / "client"),
            "ZENML_ANALYTICS_OPT_IN": "false",
            "OMP_NUM_THREADS": "1",
        }


# ZenML's steps work in /app, as in their image: there each job has its machine's folder, and this machine's is untouched.
OWN_APP = ("unshare", "--mount", "sh", "-c", 'mkdir -p /app && mount --bind "$0" /app && exec "$@"')


class Machine:
    """A machine of the cloud: a folder that is empty when a job begins, and an environment without this one's ZenML.

    It needs the right to mount (root, as in a container's default).

    Attributes:
        folder: Where its jobs start.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._environment = clean_environment() | {"PYTHONPATH": str(ROOT)} | dict(environment)
        self.replace()

    def replace(self) -> None:
        """Gives the machine back, disk and all, and takes another of its kind."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Starts a job's container command as a process."""
        words = [sys.executable if word in ("python", "python3") else word for word in command]
        own = self._environment | dict(environment) | {"ZENML_CONFIG_PATH": str(self.folder / ".zenml")}
        return subprocess.Popen(
            [*OWN_APP, str(self.folder), *words],
            cwd=self.folder,
            env=own,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> str:
        """Runs a job to its end on a fresh machine and returns what it printed."""
        self.replace()
        process = self.start(command, environment)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        return output


def stop_after(process: subprocess.Popen[str], text: str) -> str:
    """Sends SIGTERM, as a cloud that takes its machine back does, once the job has printed `text`; all that it printed."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=600)
    return "".join(lines) + rest


def write_config(folder: Path) -> Path:
    """A config of a model of a few thousand weights on the synthetic corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    return path


def run_cli(arguments: Sequence[str], environment: Mapping[str, str], cwd: Path) -> str:
    """Runs run.py as a user does and returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=cwd,
        env=clean_environment() | dict(environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
