"""The evaluation of a finished model: its held-out loss beside the baselines', and sample texts."""

from pathlib import Path

import torch

from ultrathink_model.config import Config
from ultrathink_model.data.batch import Batch
from ultrathink_model.data.loader import ValidationLoader
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.errors import TokenizerError
from ultrathink_model.evaluation.baselines import cached_baselines
from ultrathink_model.evaluation.depths import depth_reading
from ultrathink_model.evaluation.perplexity import ValidationLoss, validation_loss
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.evaluation.safety import harm_head_metrics
from ultrathink_model.evaluation.samples import generate_samples
from ultrathink_model.models.hf import load_model
from ultrathink_model.models.transformer import ModelOutput, Transformer

EVALUATION_NAME = "evaluation.json"


def evaluate_model(
    folder: Path,
    manifest: DataManifest,
    config: Config,
    destination: Path | None = None,
    device: torch.device | str | None = None,
) -> EvaluationResult:
    """Evaluates the model of a `final_model/` folder on the whole validation split.

    Args:
        folder: The model, with its tokenizer.
        manifest: The prepared data; it must have been made with the model's tokenizer.
        config: `evaluation` says how, `training.seed` what is drawn.
        destination: Folder that gets `evaluation.json`, replaced in one step; None writes nothing.
        device: Where the model runs; None takes a GPU where there is one.

    Raises:
        CheckpointError: The folder holds no model.
        TokenizerError: The data was prepared with another tokenizer than the model's.
    """
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != manifest.tokenizer_hash:
        raise TokenizerError(
            f"{folder} has another tokenizer ({tokenizer.hash[:12]}…) than the data in {manifest.path} was prepared with "
            f"({manifest.tokenizer_hash[:12]}…); set data.tokenizer_name={folder} and prepare the data again."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate(load_model(folder, device), tokenizer, manifest, config)
    if destination is not None:
        result.save(destination / EVALUATION_NAME)
    return result


def evaluate(model: Transformer, tokenizer: Tokenizer, manifest: DataManifest, config: Config) -> EvaluationResult:
    """The same for a model in memory, which is left in evaluation mode.

    Every loss is measured on exactly the tokens of `manifest.splits["validation"]`; bits per byte divide by the bytes
    of that text.
    """
    model.eval()
    split = manifest.splits["validation"]
    measured = model_loss(model, ValidationLoader(manifest, config))
    losses = {"validation": measured, **cached_baselines(manifest)}
    for name, found in losses.items():
        assert found.tokens == split.tokens, f"{name} was measured on {found.tokens} of {split.tokens} tokens"
    metrics: dict[str, float] = {}
    for name, found in losses.items():
        metrics[f"eval/{name}/loss"] = found.loss
        metrics[f"eval/{name}/perplexity"] = found.perplexity
        metrics[f"eval/{name}/bits_per_byte"] = found.bits_per_byte(split.bytes)
    metrics |= harm_head_metrics(model, tokenizer, manifest, config)
    return EvaluationResult(
        metrics=metrics,
        samples=generate_samples(model, tokenizer, manifest, config.evaluation, config.training.seed),
        reading=depth_reading(model, tokenizer, manifest, config.training.seed),
        data_fingerprint=manifest.fingerprint,
        validation_tokens=split.tokens,
        validation_bytes=split.bytes,
    )


def model_loss(model: Transformer, loader: ValidationLoader) -> ValidationLoss:
    """Mean nats per token of a model over a loader's batches, in one process."""

    def forward(batch: Batch) -> ModelOutput:
        return model(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids)

    return validation_loss(forward, loader, model.output_weight.device, lambda totals: totals)
