"""An export: the model in every format that was asked for, described, and each file proven before any takes its place."""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.config.export import ExportConfig, ExportFormat, check_formats
from ultrathink_model.data.manifest import load_manifest
from ultrathink_model.data.shards import TokenStream
from ultrathink_model.errors import CheckpointError
from ultrathink_model.evaluation.result import SavedRecord
from ultrathink_model.export.extras import require_all
from ultrathink_model.export.gguf_file import write_gguf
from ultrathink_model.export.huggingface import write_huggingface
from ultrathink_model.export.lineage import describe_model
from ultrathink_model.export.model_card import FileFacts, ModelCard, write_model_card
from ultrathink_model.export.onnx_file import PACKAGES, write_int8_onnx, write_onnx
from ultrathink_model.export.verify import Expected, expect, verify
from ultrathink_model.models.hf import load_model
from ultrathink_model.models.model_folder import existing_folder, replaced_folder
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.training.result import load_result

RECORD_FILE = "export.json"
FILES: dict[ExportFormat, str] = {
    "gguf": "gguf/model-F32.gguf",
    "gguf_int8": "gguf/model-Q8_0.gguf",
    "onnx": "onnx/model.onnx",
    "onnx_int8": "onnx/model_int8.onnx",
}
QUANTISED = {"gguf_int8", "onnx_int8"}
NEEDED = {"gguf": ["gguf"], "onnx": PACKAGES}

logger = logging.getLogger(__name__)


class ExportRecord(SavedRecord):
    """The content of `export.json`: what the export holds beside its Hugging Face files.

    Attributes:
        files: The files, with their sizes, their hashes, and the loss of those with int8 weights.
        loss: The model's own loss on the same held-out tokens; None where none was measured.
        loss_tokens: How many these are.
    """

    files: tuple[FileFacts, ...] = ()
    loss: float | None = None
    loss_tokens: int = 0


def export_model(
    final_model: Path, destination: Path, settings: ExportConfig | None = None, card: ModelCard | None = None
) -> Path:
    """Writes a model to `destination` in every format that is asked for, with its card.

    The Hugging Face folder is loaded by `transformers` in a clean process, without this package, each further file by the
    library that it is for; their logits must equal those of our own model. Only then does the whole replace what stood
    at `destination`: a failed export leaves that as it was.

    Args:
        final_model: The model, in Hugging Face format.
        destination: The export's folder.
        settings: The formats, and what the card reckons with; None takes the defaults.
        card: What `README.md` says; None describes the run that `final_model` lies in.

    Raises:
        CheckpointError: The folder holds no model or a pickle; an exported file does not load, or computes something else;
            the held-out text for the loss of int8 weights is gone.
        ConfigError: A format has no place for the architecture.
        DependencyError: A format needs a package that is not installed.
    """
    final_model = existing_folder(Path(final_model))
    destination = Path(destination)
    if destination.resolve() == final_model.resolve() or final_model.resolve() in destination.resolve().parents:
        raise CheckpointError(f"export destination {destination} lies in the model {final_model}; name another folder.")
    model = load_model(final_model).eval()
    config = model.config.model_copy(update={"export": settings or ExportConfig()})
    _check(config)
    expected = expect(model, _held_out_rows(final_model, config))
    with replaced_folder(destination) as folder:
        write_huggingface(final_model, folder, config)
        verify("huggingface", folder, expected)
        record = _write_files(model, config, folder, expected)
        record.save(folder / RECORD_FILE)
        card = card or describe_model(final_model, config.export)
        facts = {"files": record.files, "files_loss": record.loss, "files_loss_tokens": record.loss_tokens}
        write_model_card(folder, card.model_copy(update=facts))
    logger.info("exported %s to %s; all of it loads in clean processes", final_model, destination)
    return destination


def _check(config: Config) -> None:
    """Refuses, before anything is written, what cannot be exported."""
    check_formats(config)
    for kind in config.export.formats:
        require_all(NEEDED.get(kind.removesuffix("_int8"), []), "export")


def _write_files(model: Transformer, config: Config, folder: Path, expected: Expected) -> ExportRecord:
    """Writes and verifies the further formats."""
    record = ExportRecord(loss=expected.loss, loss_tokens=expected.num_held_out)
    for kind, name in FILES.items():
        if kind not in config.export.formats:
            continue
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        _write_file(kind, model, config, folder)
        # The loss of an exact copy is the model's own.
        loss = verify(kind, path, expected if kind in QUANTISED else expected.without_held_out())
        files = sorted(path.parent.glob(f"{path.name}*"))
        size = sum(file.stat().st_size for file in files)
        facts = FileFacts(format=kind, path=name, bytes=size, sha256=_hash(files), loss=loss)
        record = record.model_copy(update={"files": (*record.files, facts)})
        logger.info("exported %s (%.1f MB)", name, size / 1e6)
    return record


def _write_file(kind: ExportFormat, model: Transformer, config: Config, folder: Path) -> None:
    path = folder / FILES[kind]
    if kind in ("gguf", "gguf_int8"):
        write_gguf(folder, config, path, int8=kind == "gguf_int8")
    elif kind == "onnx":
        write_onnx(model, path)
    elif (folder / FILES["onnx"]).is_file():
        write_int8_onnx(folder / FILES["onnx"], path)
    else:
        with tempfile.TemporaryDirectory(prefix="ultrathink-export-") as scratch:
            write_onnx(model, Path(scratch) / "model.onnx")
            write_int8_onnx(Path(scratch) / "model.onnx", path)


def _hash(files: Sequence[Path]) -> str:
    """SHA-256 over the contents of the files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _held_out_rows(final_model: Path, config: Config) -> Tensor | None:
    """The first held-out tokens of the model's data in rows of its length and one more; None where none are asked for.

    Raises:
        CheckpointError: They are gone, or too few for a row.
    """
    if not QUANTISED.intersection(config.export.formats):
        return None
    result = load_result(final_model.parent)
    remedy = "leave the int8 formats out of export.formats, or prepare the data again with the run's config."
    if result is None or not Path(result.data_manifest).is_dir():
        raise CheckpointError(
            f"{final_model}: the data that the loss of int8 weights is measured on are gone; {remedy}"
        )
    manifest = load_manifest(Path(result.data_manifest))
    length = config.model.max_seq_length + 1
    wanted = max(1, config.export.loss_tokens // config.model.max_seq_length)
    rows: list[Tensor] = []
    for source in manifest.sources:
        stream = TokenStream(manifest.path, source.shards["validation"], manifest.token_dtype)
        count = min(wanted - len(rows), len(stream) // length)
        if count:
            tokens, _ = stream.read(0, count * length)
            rows.extend(torch.from_numpy(tokens).view(count, length))
    if not rows:
        raise CheckpointError(
            f"{manifest.path}: its held-out text is shorter than one sequence of {length} tokens, on which the loss of int8 "
            f"weights would be measured; {remedy}"
        )
    return torch.stack(rows)
