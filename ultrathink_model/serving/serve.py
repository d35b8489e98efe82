"""`run.py serve`: a model behind OpenAI's interface, by `transformers serve` or vLLM."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ultrathink_model.command_line import ArgumentParser
from ultrathink_model.errors import CheckpointError, ConfigError, DependencyError
from ultrathink_model.export.extras import require_all
from ultrathink_model.export.huggingface import has_chat_template, write_chat_layout
from ultrathink_model.models.guard import Guard
from ultrathink_model.models.hf import read_model_config
from ultrathink_model.models.hf_config import is_own_architecture
from ultrathink_model.models.tokenizer_files import SETTINGS_FILE, special_ids
from ultrathink_model.serving.conversation import REFUSAL
from ultrathink_model.serving.guard_flags import add_guard_flags, guard_threshold
from ultrathink_model.serving.model_choice import find_model

ADDRESS = "127.0.0.1"
ENGINES = ("auto", "transformers", "vllm")
PACKAGES = ["fastapi", "uvicorn", "openai", "accelerate"]


def make_parser() -> ArgumentParser:
    """The flags of `run.py serve`."""
    parser = ArgumentParser(prog="run.py serve", description=__doc__ or "")
    model = "a model's or a run's folder; the model of the run that finished last, by default"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=model)
    parser.add_argument("--port", type=int, default=8000, metavar="N", help=f"on {ADDRESS} (8000)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda:0, …; a GPU where there is one, by default")
    engine = "auto (the default) takes vllm where it is installed, there is a GPU and the architecture is its own"
    parser.add_argument("--engine", choices=ENGINES, default="auto", help=engine)
    add_guard_flags(parser)
    return parser


def main(arguments: list[str]) -> None:
    """Serves until it is stopped.

    Raises:
        CheckpointError: There is no such model, or its folder's name cannot be a model's name.
        ConfigError: vLLM has no such architecture, or a flag is not what it must be.
        DependencyError: The engine is not installed.
    """
    given = make_parser().parse_args(arguments)
    threshold = guard_threshold(given)
    folder = find_model(given.model).resolve()
    if "@" in folder.name or ":" in folder.name:
        raise CheckpointError(f"{folder}: the server reads @ and : in a model's name otherwise; rename the folder.")
    config = read_model_config(folder)
    own = is_own_architecture(config)
    engine = choose_engine(given.engine, own, given.device)
    if not config.advanced.harm_categories:
        threshold = None
    with tempfile.TemporaryDirectory(prefix="ultrathink-serve-") as scratch:
        served = lay_out(folder, Path(scratch) / folder.name)
        if engine == "vllm":
            serve_by_vllm(served, given.port)
        else:
            serve_by_transformers(served, given.port, given.device, own, threshold)


def lay_out(folder: Path, served: Path) -> Path:
    """The folder as it is served: links to its files, and the layout of conversations where it has none."""
    served.mkdir()
    for path in folder.iterdir():
        (served / path.name).symlink_to(path)
    if not has_chat_template(folder):
        settings = served / SETTINGS_FILE
        if settings.is_symlink():
            settings.unlink()
            shutil.copyfile(folder / SETTINGS_FILE, settings)
        write_chat_layout(served)
    return served


def choose_engine(asked: str, own_architecture: bool, device: str | None = None) -> str:
    """`transformers` or `vllm`; a device that is named is `transformers`' to take.

    Raises:
        ConfigError: vLLM is asked for, and has no such architecture, or on a device that it is not told.
        DependencyError: It is asked for, and not installed.
    """
    if asked == "vllm":
        if own_architecture:
            raise ConfigError(
                "--engine vllm has no class for the reasoning engine, the harm head, images or sound, or router biases; "
                "take --engine transformers."
            )
        if device is not None:
            raise ConfigError(
                f"--device {device} goes with --engine transformers; vLLM takes the GPUs that CUDA_VISIBLE_DEVICES shows it."
            )
        require_all(["vllm"], "vllm")
    if asked != "auto":
        return asked
    has_vllm = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()
    return "vllm" if has_vllm and device is None and not own_architecture else "transformers"


def serve_by_vllm(folder: Path, port: int) -> None:
    """Runs vLLM's server to its end.

    Raises:
        DependencyError: It failed.
    """
    _announce(folder, port, "vLLM")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    flags = ["--served-model-name", folder.name, "--host", ADDRESS, "--port", str(port)]
    code = subprocess.run([*command, *flags], check=False).returncode
    if code:
        raise DependencyError(
            f"vLLM's server ended with code {code}, and says why above; --engine transformers serves the same model."
        )


def serve_by_transformers(
    folder: Path, port: int, device: str | None, own_architecture: bool, threshold: float | None = None
) -> None:
    """Runs the server of `transformers serve` in this process, where our own architecture is known.

    Args:
        folder: The model, laid out to be served.
        port: Of the loopback address.
        device: Where it computes; None takes a GPU where there is one.
        own_architecture: Whether `transformers` has no class for it.
        threshold: Probability of harm at which the guard takes the word; None leaves the guard out.

    Raises:
        CheckpointError: There is a guard, and no token with which it could end a text.
        DependencyError: It is not installed.
    """
    require_all(PACKAGES, "serve")
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model lies here, and nothing is looked up
    from transformers.cli.serve import Serve  # noqa: PLC0415 - reads the environment as it is imported

    if own_architecture:
        _make_known(folder, threshold)
    # The model's name to clients is the name that it is loaded by: its folder's, from beside it.
    os.chdir(folder.parent)
    _announce(folder, port, f"transformers, {'without a guard' if threshold is None else 'under its guard'}")
    Serve(
        force_model=folder.name,
        device=device or ("cuda:0" if torch.cuda.is_available() else "cpu"),
        host=ADDRESS,
        port=port,
    )


def _make_known(folder: Path, threshold: float | None) -> None:
    """Lets the server find our architecture: it looks up the classes of a config among those of `transformers`.

    Its processor of images and sound is left out: the server takes a model with a tokenizer alone for one of text.
    """
    import transformers  # noqa: PLC0415

    from ultrathink_model.models.configuration_ultrathink import UltrathinkConfig  # noqa: PLC0415
    from ultrathink_model.models.modeling_ultrathink import UltrathinkForCausalLM  # noqa: PLC0415

    transformers.AutoConfig.register(UltrathinkConfig.model_type, UltrathinkConfig, exist_ok=True)
    served = UltrathinkForCausalLM if threshold is None else _guarded(folder, threshold)
    transformers.UltrathinkForCausalLM = served  # type: ignore[attr-defined]


def _guarded(folder: Path, threshold: float) -> type:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    from ultrathink_model.serving.guarded import guarded_by  # noqa: PLC0415

    end = special_ids(folder).get("eos_token_id")
    if end is None:
        raise CheckpointError(
            f"{folder}: its tokenizer has no token that ends a text, with which the guard would; serve it with --no-guard."
        )
    refusal = PreTrainedTokenizerFast.from_pretrained(folder)(REFUSAL, add_special_tokens=False).input_ids
    return guarded_by(Guard(threshold=threshold, redirect=refusal), end)


def _announce(folder: Path, port: int, engine: str) -> None:
    print(f"{folder} by {engine}: http://{ADDRESS}:{port}/v1 as model {folder.name!r} (Ctrl-C ends).", flush=True)
