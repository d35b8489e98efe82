"""Loss by position: what the model makes of the context that it has, and of more than it was trained on."""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from ultrathink_model.data.batch import NO_GROUP
from ultrathink_model.data.loader import SplitReader
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.pack import Row
from ultrathink_model.data.shards import read_ends
from ultrathink_model.evaluation.heldout import ratio_stderr
from ultrathink_model.evaluation.result import ContextLoss
from ultrathink_model.evaluation.scoring import score_tokens
from ultrathink_model.models.transformer import Transformer

# The first bin holds the positions below this; each further one reaches twice as far.
FIRST_BIN = 16


def loss_by_context(
    model: Transformer, manifest: DataManifest, length: int, windows: int, batch_size: int
) -> list[ContextLoss]:
    """Mean loss of held-out tokens by how many tokens of their own document stand before them in a window.

    Each held-out document is cut into windows of `length` tokens, of which some are taken evenly over the split; sources
    of images and sounds are left out. The standard error is over windows.

    Args:
        model: The model, in evaluation mode.
        manifest: The prepared data.
        length: Tokens of a window; more than `model.max_seq_length` are allowed.
        windows: Windows that are read, at most.
        batch_size: Sequences of `model.max_seq_length` tokens that make a batch.

    Returns:
        One entry for each bin of positions that any window reaches.
    """
    together = max(1, batch_size * model.config.model.max_seq_length // length)
    reader = SplitReader(manifest, "validation")
    rows = list(_rows(reader, manifest, length, windows))
    parts = [_scores(model, reader, rows[start : start + together]) for start in range(0, len(rows), together)]
    nats, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    edges = [0]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1] or FIRST_BIN, length))
    bins = [_bin(nats, counts, low, high) for low, high in itertools.pairwise(edges)]
    return [found for found in bins if found.tokens]


def context_metrics(losses: list[ContextLoss]) -> dict[str, float]:
    """`eval/context/loss_from_<position>` and its standard error for each bin."""
    metrics: dict[str, float] = {}
    for found in losses:
        name = f"eval/context/loss_from_{found.first}"
        metrics |= {name: found.loss, f"{name}_stderr": found.stderr}
    return metrics


def _rows(reader: SplitReader, manifest: DataManifest, length: int, windows: int) -> Iterator[Row]:
    """The chosen windows of the held-out documents, the rest of each row being padding."""
    places = [
        (number, start, min(length, end - start))
        for number in range(len(manifest.sources))
        for begin, end in _documents(manifest, number)
        for start in range(begin, end, length)
    ]
    chosen = np.unique(np.linspace(0, len(places) - 1, min(windows, len(places))).round().astype(int))
    for number, start, size in (places[index] for index in chosen):
        yield reader.read(number, [(start, size)], length)


def _documents(manifest: DataManifest, source: int) -> Iterator[tuple[int, int]]:
    """Where each held-out document of a source starts in its stream, and where it ends."""
    base = 0
    for shard in manifest.sources[source].shards["validation"]:
        begin = base
        for end in read_ends(manifest.path, shard).tolist():
            yield begin, base + end
            begin = base + end
        base += shard.tokens


def _scores(
    model: Transformer, reader: SplitReader, rows: list[Row]
) -> tuple[Float64[np.ndarray, "rows seq"], Float64[np.ndarray, "rows seq"]]:
    """Nats of each token, and 1 where there is one."""
    batch = reader.stack(rows, [NO_GROUP] * len(rows)).to(model.output_weight.device)
    scores = score_tokens(model, batch.input_ids, batch.labels, batch.document_ids, media=batch.media)
    return scores.nats.double().cpu().numpy(), scores.counts.double().cpu().numpy()


def _bin(
    nats: Float64[np.ndarray, "rows seq"], counts: Float64[np.ndarray, "rows seq"], low: int, high: int
) -> ContextLoss:
    reaches = counts[:, low] > 0
    own, tokens = nats[reaches, low:high].sum(1), counts[reaches, low:high].sum(1)
    number = int(tokens.sum())
    return ContextLoss(
        first=low,
        last=high - 1,
        loss=float(own.sum()) / max(1, number),
        stderr=ratio_stderr(own, tokens) if number else 0.0,
        tokens=number,
    )
