"""Rewards that read text: Hugging Face classifiers and Python functions."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ultrathink_model.alignment.sequences import Sequences
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.errors import CheckpointError, ConfigError, RewardError

BATCH = 32


class TextReward(Protocol):
    """A reward that reads prompts and responses as text."""

    def __call__(self, prompts: list[str], responses: list[str]) -> Float[Tensor, " batch"]:
        """One number for each response."""
        ...


@dataclass(frozen=True)
class TextScorer:
    """A text reward as a scorer of tokens; special tokens are left out of the texts."""

    reward: TextReward
    tokenizer: Tokenizer

    def score(self, sequences: Sequences) -> Float[Tensor, " batch"]:
        """See `Scorer`."""
        cut = sequences.prompt_length
        mask = (
            torch.ones_like(sequences.tokens[:, :cut]).bool()
            if sequences.prompt_mask is None
            else sequences.prompt_mask
        )
        prompts = self._texts(sequences.tokens[:, :cut], mask)
        return self.reward(prompts, self._texts(sequences.responses, sequences.response_mask))

    def _texts(self, tokens: Tensor, mask: Tensor) -> list[str]:
        return [self.tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]


class CallableReward:
    """A function of the user's, `module:function`, that takes the prompts and the responses as two lists of texts.

    Args:
        name: Name of the reward, for messages.
        source: Where the function is; the module is found as Python finds it.

    Raises:
        ConfigError: There is no such module or function.
    """

    def __init__(self, name: str, source: str) -> None:
        module, _, attribute = source.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute) if attribute else None
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"rlhf.rewards: {name}: {source} cannot be imported: {error}") from None
        if not callable(found):
            raise ConfigError(f"rlhf.rewards: {name}: {source} is no function; write module:function")
        self._name, self._source = name, source
        self._function: Callable[[list[str], list[str]], Sequence[float]] = found

    def __call__(self, prompts: list[str], responses: list[str]) -> Float[Tensor, " batch"]:
        """What the function returns.

        Raises:
            RewardError: It raises, or does not return a number for each response.
        """
        try:
            numbers = torch.tensor([float(number) for number in self._function(prompts, responses)])
        except Exception as error:
            raise RewardError(
                f"rlhf.rewards: {self._name}: {self._source} raised {type(error).__name__}: {error}; mend it, or set "
                "rlhf.on_bad_reward=skip"
            ) from error
        if len(numbers) != len(responses):
            raise RewardError(
                f"rlhf.rewards: {self._name}: {self._source} returned {len(numbers)} numbers for {len(responses)} responses"
            )
        return numbers


class ClassifierReward:
    """A sequence classifier of `transformers`, which reads the response alone; its reward is the label's log-odds.

    A classifier with one output is a regression, and its output the reward. Code that lies in the folder is not run.

    Args:
        key: Where the config names it, for messages.
        folder: The classifier's folder.
        label: The label; None takes the last.
        device: Where it computes.

    Raises:
        CheckpointError: The folder holds no classifier, or one without that label.
    """

    def __init__(self, key: str, folder: Path, label: str | None, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415 - takes seconds

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"{key}: {folder} holds no classifier: {error}") from None
        labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
        if label is not None and label not in labels:
            raise CheckpointError(f"{key}: {folder} has no label {label!r}; it has {', '.join(labels)}")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # A decoder looks for the last token that is no padding.
        model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model, self._device = model.eval().to(device), device
        self._column = -1 if label is None else labels.index(label)

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str]) -> Float[Tensor, " batch"]:
        """The log-odds of the label."""
        parts = []
        for start in range(0, len(responses), BATCH):
            batch = self._tokenizer(
                responses[start : start + BATCH], return_tensors="pt", padding=True, truncation=True
            ).to(self._device)
            logits = self._model(**batch).logits.float()
            if logits.shape[1] == 1:
                parts.append(logits[:, 0])
            else:
                logprobs = logits.log_softmax(-1)[:, self._column]
                parts.append(logprobs - torch.log1p(-logprobs.exp().clamp_max(1 - 1e-6)))
        return torch.cat(parts).cpu()
