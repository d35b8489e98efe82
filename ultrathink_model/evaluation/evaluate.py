"""The evaluation of a finished model: its held-out loss beside the baselines', built-in measures, tasks, samples."""

from pathlib import Path

import torch

from ultrathink_model.config import Config
from ultrathink_model.data.loader import ValidationLoader
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.errors import TokenizerError
from ultrathink_model.evaluation.baselines import cached_baselines
from ultrathink_model.evaluation.context import context_metrics
from ultrathink_model.evaluation.depths import depth_reading
from ultrathink_model.evaluation.harness import task_metrics
from ultrathink_model.evaluation.heldout import score_split
from ultrathink_model.evaluation.measures import measure_blimp, measure_context
from ultrathink_model.evaluation.multimodal import digit_metrics
from ultrathink_model.evaluation.perplexity import ValidationLoss, bits_per_byte
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.evaluation.safety import harm_head_metrics
from ultrathink_model.evaluation.samples import PROMPT_TOKENS, generate_samples, held_out_prompts
from ultrathink_model.evaluation.speed import generation_speed
from ultrathink_model.models.hf import load_model
from ultrathink_model.models.transformer import Transformer

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
        ConfigError: `evaluation.tasks` or `evaluation.blimp` names something that is not there.
        DataError: A task's data cannot be had or read.
        DependencyError: There are tasks, and lm-eval is not installed.
    """
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != manifest.tokenizer_hash:
        raise TokenizerError(
            f"{folder} has another tokenizer ({tokenizer.hash[:12]}…) than the data in {manifest.path} was prepared with "
            f"({manifest.tokenizer_hash[:12]}…); set data.tokenizer_name={folder} and prepare the data again."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate(load_model(folder, device), tokenizer, manifest, config)
    if config.evaluation.tasks:
        found = task_metrics(folder, config, device)
        result = result.model_copy(update={"metrics": result.metrics | found})
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
    settings = config.evaluation
    scores = score_split(model, ValidationLoader(manifest, config), settings.calibration_bins)
    losses = {"validation": scores.loss, **cached_baselines(manifest)}
    for name, found in losses.items():
        assert found.tokens == split.tokens, f"{name} was measured on {found.tokens} of {split.tokens} tokens"
    metrics: dict[str, float] = {}
    for name, found in losses.items():
        metrics |= _loss_metrics(name, found, split.bytes)
    metrics |= _loss_stderrs(scores.loss, scores.loss_stderr, split.bytes) | scores.calibration()
    context = measure_context(model, manifest, config)
    metrics |= context_metrics(context) | measure_blimp(model, tokenizer, config)
    metrics |= harm_head_metrics(model, tokenizer, manifest, config)
    media, media_answers = digit_metrics(model, tokenizer, manifest, settings)
    metrics |= media
    if settings.speed_tokens:
        prompt = held_out_prompts(manifest, tokenizer, 1, PROMPT_TOKENS, config.training.seed)[0]
        metrics |= generation_speed(model, prompt, settings.speed_tokens, settings.batch_size)
    return EvaluationResult(
        metrics=metrics,
        samples=generate_samples(model, tokenizer, manifest, settings, config.training.seed),
        reliability=scores.reliability(),
        context=context,
        reading=depth_reading(model, tokenizer, manifest, config.training.seed),
        media_answers=media_answers,
        data_fingerprint=manifest.fingerprint,
        validation_tokens=split.tokens,
        validation_bytes=split.bytes,
    )


def _loss_metrics(task: str, found: ValidationLoss, text_bytes: int) -> dict[str, float]:
    return {
        f"eval/{task}/loss": found.loss,
        f"eval/{task}/perplexity": found.perplexity,
        f"eval/{task}/bits_per_byte": found.bits_per_byte(text_bytes),
    }


def _loss_stderrs(found: ValidationLoss, stderr: float, text_bytes: int) -> dict[str, float]:
    """The loss's standard error and what follows from it for the other two measures, to first order."""
    return {
        "eval/validation/loss_stderr": stderr,
        "eval/validation/perplexity_stderr": found.perplexity * stderr,
        "eval/validation/bits_per_byte_stderr": bits_per_byte(stderr * found.tokens, text_bytes),
    }
