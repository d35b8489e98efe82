"""The held-out split, token by token: its loss with its standard error, accuracy, and calibration."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from ultrathink_model.data.batch import Batch
from ultrathink_model.evaluation.perplexity import ValidationLoss
from ultrathink_model.evaluation.result import ReliabilityBin
from ultrathink_model.evaluation.scoring import TokenScores, score_tokens
from ultrathink_model.models.transformer import Transformer

RESAMPLES = 200


@dataclass(frozen=True)
class HeldOutScores:
    """Sums over each row of the split, from which every figure and its standard error follows.

    Rows, not tokens, are what is drawn at random: the tokens of one text are alike, and errors that took them for
    independent would come out too small.

    Attributes:
        nats: Cross-entropy of each row.
        tokens: Tokens that each row predicts.
        bins: Number, summed confidence and hits of the tokens of each bin of confidence, by row.
    """

    nats: Float64[np.ndarray, " rows"]
    tokens: Float64[np.ndarray, " rows"]
    bins: Float64[np.ndarray, "rows bins 3"]

    @property
    def loss(self) -> ValidationLoss:
        """Mean nats per token."""
        count = int(self.tokens.sum())
        return ValidationLoss(float(self.nats.sum()) / count, count)

    @property
    def loss_stderr(self) -> float:
        """Standard error of the mean nats per token."""
        return ratio_stderr(self.nats, self.tokens)

    def calibration(self) -> dict[str, float]:
        """Accuracy of the likeliest token and the expected calibration error (Guo et al. 2017, arXiv 1706.04599).

        The error is the mean distance between confidence and accuracy over bins of equal width, weighted by tokens; its
        standard error is bootstrapped over the rows.
        """
        resampled = np.random.default_rng(0).multinomial(
            len(self.nats), np.full(len(self.nats), 1 / len(self.nats)), RESAMPLES
        )
        errors = _calibration_error(np.tensordot(resampled, self.bins, axes=1))
        hits = self.bins[:, :, 2].sum(1)
        return {
            "eval/validation/accuracy": float(hits.sum() / self.tokens.sum()),
            "eval/validation/accuracy_stderr": ratio_stderr(hits, self.tokens),
            "eval/validation/calibration_error": float(_calibration_error(self.bins.sum(0)[None])[0]),
            "eval/validation/calibration_error_stderr": float(errors.std(ddof=1)),
        }

    def reliability(self) -> list[ReliabilityBin]:
        """Confidence and accuracy of each bin that any token fell into, the least confident first."""
        return [
            ReliabilityBin(confidence=confidence / count, accuracy=hits / count, tokens=int(count))
            for count, confidence, hits in self.bins.sum(0).tolist()
            if count
        ]


def score_split(model: Transformer, loader: Iterable[Batch], bins: int) -> HeldOutScores:
    """One pass over a split's batches, each of its tokens predicted once.

    Args:
        model: The model, in evaluation mode.
        loader: The batches.
        bins: Bins of confidence.
    """
    device = model.output_weight.device
    parts = []
    for batch in loader:
        moved = batch.to(device)
        parts.append(
            _row_sums(score_tokens(model, moved.input_ids, moved.labels, moved.document_ids, media=moved.media), bins)
        )
    nats, tokens, tables = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return HeldOutScores(nats, tokens, tables)


def ratio_stderr(numerators: Float64[np.ndarray, " rows"], counts: Float64[np.ndarray, " rows"]) -> float:
    """Standard error of Σ numerators / Σ counts over rows drawn independently, by the delta method; NaN for one row."""
    rows = len(counts)
    if rows < 2:
        return float("nan")
    residuals = numerators - counts * (numerators.sum() / counts.sum())
    return float(np.sqrt(rows / (rows - 1) * np.square(residuals).sum()) / counts.sum())


def _row_sums(scores: TokenScores, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    place = (scores.confidence * bins).long().clamp_max(bins - 1)
    columns = torch.stack([scores.counts.double(), scores.confidence.double(), scores.is_right.double()], dim=-1)
    table = columns.new_zeros(len(place), bins, 3).scatter_add_(1, place.unsqueeze(-1).expand_as(columns), columns)
    return scores.nats.double().sum(1).cpu().numpy(), scores.counts.double().sum(1).cpu().numpy(), table.cpu().numpy()


def _calibration_error(bins: Float64[np.ndarray, "samples bins 3"]) -> Float64[np.ndarray, " samples"]:
    return np.abs(bins[:, :, 2] - bins[:, :, 1]).sum(1) / bins[:, :, 0].sum(1)
