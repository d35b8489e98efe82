"""Tuning a model on the revisions of its own answers."""

from collections.abc import Callable, Sequence

import torch

from ultrathink_model.alignment.draws import TUNING_ORDER, shuffled
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.reward_training import learning_rate_factor
from ultrathink_model.config import Config
from ultrathink_model.data.batch import Batch
from ultrathink_model.data.pack import IGNORED
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.training.guard import TrainingDivergedError

AfterStep = Callable[[int, int, float], None]


def tune(
    learner: Learner,
    texts: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    config: Config,
    first_routing_step: int,
    after_step: AfterStep,
) -> int:
    """Supervised fine-tuning on prompts with their answers; the prompts are not predicted.

    Args:
        learner: The model.
        texts: Each a prompt and what is to follow on it.
        tokenizer: Its tokenizer.
        config: The keys `constitutional.sft_*`.
        first_routing_step: Where the reasoning engine's annealing stands.
        after_step: Told the step, all steps and the step's mean loss in nats.

    Returns:
        Tokens that were predicted.

    Raises:
        TrainingDivergedError: A gradient is not finite.
    """
    section = config.constitutional
    size = min(section.sft_batch_size, len(texts))
    per_epoch = -(-len(texts) // size)
    steps, tokens = per_epoch * section.sft_epochs, 0
    for step in range(steps):
        epoch, part = divmod(step, per_epoch)
        order = shuffled(len(texts), config.training.seed, TUNING_ORDER, epoch)
        rows = order[part * size : (part + 1) * size].tolist()
        batch = answer_batch([texts[row] for row in rows], tokenizer, config.model.max_seq_length)
        learner.scale_rates(learning_rate_factor(step, steps))
        count, loss = learner.add_language_model_gradient([batch], 1.0, first_routing_step + step, is_last=True)
        norm = learner.step()
        learner.end_routing_step()
        if not torch.isfinite(norm):
            raise TrainingDivergedError(
                f"tuning on revisions has a gradient of norm {float(norm):g} under "
                f"constitutional.sft_learning_rate={section.sft_learning_rate:g}; lower it"
            )
        tokens += count
        after_step(step + 1, steps, loss)
    return tokens


def answer_batch(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int) -> Batch:
    """Rows of prompt and answer, padded on the right, with labels on the answer and its end-of-text token.

    What is longer than `length` loses the beginning of its prompt.
    """
    rows = []
    for prompt, answer in texts:
        head = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        tail = [*tokenizer.encode(f" {answer}"), tokenizer.eos_id][: length - 1]
        head = head[-(length + 1 - len(tail)) :]
        rows.append((head, tail))
    longest = max(len(head) + len(tail) for head, tail in rows) - 1
    input_ids = torch.full((len(rows), longest), tokenizer.pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for row, (head, tail) in enumerate(rows):
        ids = torch.tensor(head + tail)
        input_ids[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(head) - 1 : len(ids) - 1] = ids[len(head) :]
    return Batch(input_ids, labels, None, None, int((labels != IGNORED).sum()))
