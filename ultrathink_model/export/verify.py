"""The proof that an exported file is the model: loaded in a clean process, and its predictions compared with ours."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from ultrathink_model.config.export import ExportFormat
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.transformer import Transformer

LOAD_CHECK = Path(__file__).resolve().with_name("load_check.py")
PROBE_TOKENS = 16
LOAD_SECONDS = 3600
# Both sides compute in float32, where another order of sums moves a logit by about 1e-5 of the largest; a weight in
# the wrong place moves it by its own size.
RELATIVE_TOLERANCE = 1e-3
# Eight bits leave each weight an error of 0.4 % of its block's largest, which adds up over the blocks of a model. That
# the loss holds is what counts, and it is measured; this only tells a quantised model from a broken one.
INT8_TOLERANCE = 0.25


class Expected(NamedTuple):
    """What the model itself makes of the probe.

    Attributes:
        tokens: The probe.
        logits: What the model predicts after each token.
        held_out: Rows on which the loss is measured; None where it is not.
        loss: The model's loss on them, in nats per token.
    """

    tokens: Int[Tensor, "1 seq"]
    logits: Float[Tensor, "1 seq vocab"]
    held_out: Int[Tensor, "rows longer"] | None = None
    loss: float | None = None

    @property
    def num_held_out(self) -> int:
        """Tokens that the loss is a mean over."""
        return 0 if self.held_out is None else self.held_out[:, 1:].numel()

    def without_held_out(self) -> "Expected":
        """The same without the rows."""
        return self._replace(held_out=None, loss=None)


@torch.no_grad()
def expect(model: Transformer, held_out: Int[Tensor, "rows longer"] | None = None) -> Expected:
    """Has the model itself read the probe, and the held-out rows where there are any."""
    model.eval()
    shape = model.config.model
    # llama.cpp reads no more than the model's length.
    tokens = torch.arange(min(PROBE_TOKENS, shape.max_seq_length)).remainder(shape.vocab_size).unsqueeze(0)
    logits = model(tokens).logits
    if held_out is None:
        return Expected(tokens, logits)
    sums = [model(row[None, :-1], labels=row[None, 1:]).loss_sum for row in held_out]
    return Expected(tokens, logits, held_out, float(torch.stack(sums).sum()) / held_out[:, 1:].numel())


def verify(kind: ExportFormat, path: Path, expected: Expected) -> float | None:
    """Loads an exported file in a clean process and compares what it predicts.

    Args:
        kind: Its format.
        path: The file, or the folder.
        expected: What it must predict.

    Returns:
        Its loss on the held-out rows, where there are any.

    Raises:
        CheckpointError: It does not load, or computes something else.
    """
    with tempfile.TemporaryDirectory(prefix="ultrathink-export-") as scratch:
        probe = {"tokens": expected.tokens}
        if expected.held_out is not None:
            probe["held_out"] = expected.held_out.contiguous()
        save_file(probe, f"{scratch}/probe.safetensors")
        _load_elsewhere(kind, path, Path(scratch))
        found = load_file(f"{scratch}/result.safetensors")
    is_quantised = kind.endswith("_int8")
    logits, largest = found["logits"], expected.logits.abs().max()
    difference = (
        (logits - expected.logits).abs().max() if logits.shape == expected.logits.shape else torch.tensor(torch.inf)
    )
    bound = INT8_TOLERANCE * largest if is_quantised else RELATIVE_TOLERANCE * (1 + largest)
    # Written so that a difference that is not a number fails too.
    if not difference <= bound:
        raise CheckpointError(
            f"the {kind} export {path.name} computes something else than the model: logits {tuple(logits.shape)} differ by "
            f"{float(difference):.3g}, more than {float(bound):.3g}. Nothing was exported; train or save the model again."
        )
    return float(found["loss"]) if "loss" in found else None


def _load_elsewhere(kind: str, path: Path, scratch: Path) -> None:
    """Runs the load check in isolated mode, offline, in an empty folder with an empty module cache."""
    command = [
        sys.executable,
        "-I",
        str(LOAD_CHECK),
        kind,
        str(path.resolve()),
        str(scratch / "probe.safetensors"),
        str(scratch / "result.safetensors"),
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
            f"the {kind} export {path.name} did not load in a clean process within {LOAD_SECONDS} s. Nothing was exported; "
            "look whether the machine swaps."
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise CheckpointError(
            f"the {kind} export {path.name} does not load in a clean process: {reason}. Nothing was exported; save the model again."
        )
