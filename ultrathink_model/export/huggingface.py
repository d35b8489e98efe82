"""A Hugging Face folder for others: copied, described, and proven to load before it takes its place."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ultrathink_model.errors import CheckpointError
from ultrathink_model.export.lineage import describe_model
from ultrathink_model.export.model_card import ModelCard, write_model_card
from ultrathink_model.models.hf import load_model
from ultrathink_model.models.model_folder import existing_folder, replaced_folder

logger = logging.getLogger(__name__)

LOAD_CHECK = Path(__file__).resolve().with_name("load_check.py")
PROBE_TOKENS = 16
LOAD_SECONDS = 3600
# Both sides compute in float32, where another order of sums moves a logit by about 1e-5 of the largest; a weight in
# the wrong place moves it by its own size.
RELATIVE_TOLERANCE = 1e-3
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def export_model(final_model: Path, destination: Path, card: ModelCard | None = None) -> Path:
    """Copies a model folder to `destination` with its card, once it is proven to load elsewhere.

    The copy is loaded by `transformers` in a clean process, without this package; its logits must equal those of our
    own model, and it must generate. Only then does it replace what stood at `destination`: a failed export leaves
    that as it was.

    Args:
        final_model: The model, in Hugging Face format.
        destination: The export's folder.
        card: What `README.md` says; None describes the run that `final_model` lies in.

    Raises:
        CheckpointError: The folder holds no model or a pickle, or it does not load, or computes something else.
    """
    final_model = existing_folder(Path(final_model))
    destination = Path(destination)
    if destination.resolve() == final_model.resolve() or final_model.resolve() in destination.resolve().parents:
        raise CheckpointError(f"export destination {destination} lies in the model {final_model}; name another folder.")
    pickles = [path.name for path in final_model.rglob("*") if path.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{final_model} holds {', '.join(sorted(pickles))}: pickles run code when they are loaded and are not "
            "exported; save the model again as safetensors."
        )
    with replaced_folder(destination) as folder:
        shutil.copytree(final_model, folder, dirs_exist_ok=True)
        write_model_card(folder, card or describe_model(final_model))
        _verify(folder, final_model)
    logger.info("exported %s to %s; it loads in a clean process", final_model, destination)
    return destination


def _verify(folder: Path, original: Path) -> None:
    """Compares the folder's logits in a clean process with the original's in ours."""
    model = load_model(original).eval()
    tokens = torch.arange(PROBE_TOKENS).remainder(model.config.model.vocab_size).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
    del model
    with tempfile.TemporaryDirectory(prefix="ultrathink-export-") as scratch:
        save_file({"tokens": tokens}, f"{scratch}/probe.safetensors")
        _load_elsewhere(folder, Path(scratch))
        found = load_file(f"{scratch}/logits.safetensors")["logits"]
    difference = (found - expected).abs().max() if found.shape == expected.shape else torch.tensor(torch.inf)
    bound = RELATIVE_TOLERANCE * (1 + expected.abs().max())
    # Written so that a difference that is not a number fails too.
    if not difference <= bound:
        raise CheckpointError(
            f"the export of {original} computes something else than the model: logits {tuple(found.shape)} differ by "
            f"{float(difference):.3g}, more than {float(bound):.3g}. Nothing was exported; train or save the model again."
        )


def _load_elsewhere(folder: Path, scratch: Path) -> None:
    """Runs the load check in isolated mode, offline, in an empty folder with an empty module cache."""
    command = [
        sys.executable,
        "-I",
        str(LOAD_CHECK),
        str(folder.resolve()),
        str(scratch / "probe.safetensors"),
        str(scratch / "logits.safetensors"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf"), "HF_MODULES_CACHE": str(scratch / "modules")}
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            env=os.environ | offline | {"CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"the export in {folder} did not load in a clean process within {LOAD_SECONDS} s. Nothing was exported; "
            "look whether the machine swaps."
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise CheckpointError(
            f"the export in {folder} does not load in a clean process: {reason}. Nothing was exported; save the model again."
        )
