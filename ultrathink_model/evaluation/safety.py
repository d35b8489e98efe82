"""What the harm head is worth on labelled texts that it has not learnt from."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.safety import load_safety_texts
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.models.transformer import Transformer


def harm_head_metrics(
    model: Transformer, tokenizer: Tokenizer, manifest: DataManifest, config: Config
) -> dict[str, float]:
    """ROC-AUC of each category on the held-out labelled texts, and how often a guard at 0.5 would act.

    `eval/safety/caught` is the share of harmful texts that some category gives more than half, `false_alarms` that of
    harmless ones. A category that no held-out text has, or all have, is left out; so is all for a model without the
    head.

    Raises:
        DataError: `constitutional.safety_data` cannot be used.
    """
    if model.harm_head is None:
        return {}
    texts = load_safety_texts(config).held_out
    scores = harm_probabilities(model, tokenizer, manifest, [text.text for text in texts], config)
    labels = torch.tensor([[name in text.categories for name in categories(model)] for text in texts])
    metrics = {}
    for column, name in enumerate(categories(model)):
        if 0 < int(labels[:, column].sum()) < len(texts):
            metrics[f"eval/safety/auc_{name}"] = roc_auc(scores[:, column], labels[:, column])
    acts, harmful = (scores > 0.5).any(1), labels.any(1)
    for name, rows in (("caught", harmful), ("false_alarms", ~harmful)):
        if bool(rows.any()):
            metrics[f"eval/safety/{name}"] = float(acts[rows].float().mean())
    return metrics


def categories(model: Transformer) -> tuple[str, ...]:
    """What the model's harm head scores."""
    return model.config.advanced.harm_categories


@torch.no_grad()
def harm_probabilities(
    model: Transformer, tokenizer: Tokenizer, manifest: DataManifest, texts: list[str], config: Config
) -> Float[Tensor, "texts categories"]:
    """The harm head's probabilities at the end of each text, of which the last tokens count where it is too long."""
    assert model.harm_head is not None, "the caller has looked"
    length, size = model.config.model.max_seq_length, config.evaluation.batch_size
    device = model.output_weight.device
    encoded = [[tokenizer.bos_id, *ids][-length:] for ids in tokenizer.encode_batch(texts)]
    parts = []
    for start in range(0, len(encoded), size):
        rows = encoded[start : start + size]
        longest = max(map(len, rows))
        tokens = torch.tensor([[*ids, *[manifest.pad_id] * (longest - len(ids))] for ids in rows], device=device)
        hidden = model(tokens, return_logits=False).hidden
        ends = torch.tensor([len(ids) - 1 for ids in rows], device=device)
        parts.append(model.harm_head(hidden[torch.arange(len(rows), device=device), ends]).sigmoid().cpu())
    return torch.cat(parts)


def roc_auc(scores: Float[Tensor, " texts"], labels: Bool[Tensor, " texts"]) -> float:
    """Chance that a positive text has a higher score than a negative one; ties count half.

    Args:
        scores: The higher, the likelier positive.
        labels: Both kinds must be among them.
    """
    positive, negative = scores[labels].double(), scores[~labels].double()
    above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    return float(above.mean())
