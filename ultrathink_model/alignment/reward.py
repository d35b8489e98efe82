"""The reward model: a language model's trunk with a scalar head, and its folder on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ultrathink_model.alignment.precision import in_run_precision
from ultrathink_model.alignment.sequences import Forward, Sequences
from ultrathink_model.errors import CheckpointError, DataError
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.models.model_folder import existing_folder, replaced_folder
from ultrathink_model.models.transformer import Transformer

HEAD_FILE = "reward_head.safetensors"
RECORD_FILE = "reward.json"

Pooling = Literal["mean", "last"]


class RewardRecord(BaseModel):
    """What is known of a trained reward model: the content of `reward.json`.

    Attributes:
        pooling: How the numbers at the tokens of a response become its score.
        mean: Mean raw score over the sides of the training pairs.
        spread: Standard deviation of those scores.
        accuracy: Share of held-out pairs whose chosen side has the higher score.
        loss: Mean -log σ(chosen - rejected) of the held-out pairs, in nats; ln 2 is chance.
        length_accuracy: Share of held-out pairs that "the longer response is better" ranks right; ties count half.
        held_out_pairs: Pairs that accuracy and loss were measured on.
        prompt_accuracy: Mean over the held-out prompts of the share of their pairs that are ranked right.
        calibration_error: How far the claimed probabilities of the held-out pairs are from the truth; see
            `objectives.calibration_error`.
    """

    model_config = ConfigDict(frozen=True)

    pooling: Pooling
    mean: float
    spread: float
    accuracy: float
    loss: float
    length_accuracy: float
    held_out_pairs: int
    prompt_accuracy: float
    calibration_error: float


class Scorer(Protocol):
    """Anything that scores responses."""

    def score(self, sequences: Sequences) -> Float[Tensor, " batch"]:
        """One finite number for each response; the higher, the better."""
        ...


class RewardHead(nn.Module):
    """One number from the state at a token; zero before training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows"]:
        """The raw number. It has no constant: preferences do not decide one, `RewardRecord.mean` removes it."""
        return states.float() @ self.weight


@dataclass(frozen=True)
class RewardModel:
    """A trained reward model.

    Attributes:
        trunk: The language model, in evaluation mode.
        head: Its scalar head.
        record: Its normalisation, and how good it is.
    """

    trunk: Transformer
    head: RewardHead
    record: RewardRecord

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Float[Tensor, " batch"]:
        """Scores in standard deviations from the mean of the training pairs, so that any reward model counts alike.

        Raises:
            DataError: A score is not a finite number.
        """
        forward = in_run_precision(self.trunk.config, self.trunk, sequences.tokens.device)
        scores = (
            raw_scores(forward, self.head, sequences, self.record.pooling) - self.record.mean
        ) / self.record.spread
        finite = torch.isfinite(scores)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise DataError(
                f"the reward model scored {int((~finite).sum())} of {len(scores)} responses with a number that is not "
                f"finite, such as the tokens {sequences.responses[row].tolist()}; nothing was learnt from them. Delete "
                "reward_model/ in the run's folder, lower rlhf.reward_learning_rate and start again"
            )
        return scores


def raw_scores(forward: Forward, head: RewardHead, sequences: Sequences, pooling: Pooling) -> Float[Tensor, " batch"]:
    """The head's numbers for the response tokens, pooled to one for each response.

    Args:
        forward: The trunk's.
        head: Reads the state at a token, which has seen that token.
        sequences: Prompts with responses.
        pooling: `last` takes the number at the response's last token, `mean` the mean over all of its tokens.
    """
    output = forward(sequences.tokens, attention_mask=sequences.attention_mask, return_logits=False)
    mask = sequences.response_mask
    numbers = head(output.hidden[:, sequences.prompt_length :])  # (batch, response)
    if pooling == "last":
        return numbers.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    return (numbers * mask).sum(1) / mask.sum(1)


def save_reward_model(model: RewardModel, tokenizer_folder: Path, folder: Path) -> None:
    """Writes the trunk as any model folder, with the head and its record beside it, whole or not at all."""
    with replaced_folder(folder) as new:
        save_model(model.trunk, tokenizer_folder, new)
        save_file({name: tensor.detach().cpu() for name, tensor in model.head.state_dict().items()}, new / HEAD_FILE)
        (new / RECORD_FILE).write_text(model.record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_reward_model(folder: Path, device: torch.device | str = "cpu") -> RewardModel:
    """Reads a reward model's folder.

    Raises:
        CheckpointError: The folder holds no reward model, or a damaged one.
    """
    folder = existing_folder(folder)
    trunk = load_model(folder, device)
    head = RewardHead(trunk.config.model.hidden_size).to(device)
    try:
        head.load_state_dict(load_file(folder / HEAD_FILE))
        record = RewardRecord.model_validate_json((folder / RECORD_FILE).read_bytes())
    except (OSError, SafetensorError, RuntimeError, ValidationError) as error:
        raise CheckpointError(
            f"{folder} is no reward model: {HEAD_FILE} or {RECORD_FILE} is missing or damaged ({error}); delete the "
            "folder, and it is trained anew"
        ) from None
    return RewardModel(trunk.eval().requires_grad_(False), head.requires_grad_(False), record)
