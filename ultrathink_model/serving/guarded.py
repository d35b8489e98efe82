"""The guard within `transformers`' own generation: a model that hands it the word once a text turns harmful."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ultrathink_model.models.configuration_ultrathink import UltrathinkConfig
from ultrathink_model.models.guard import Guard, GuardedRows
from ultrathink_model.models.modeling_ultrathink import UltrathinkForCausalLM


class GuardedWords(LogitsProcessor):
    """Leaves nothing likely but the guard's next word, in rows that it has taken over, and then the end.

    Args:
        model: Has a harm head, and has just read what the scores follow on.
        guard: The guard.
        end: The token that ends a row.
    """

    def __init__(self, model: "GuardedModel", guard: Guard, end: int) -> None:
        self._model, self._guard, self._end = model, guard, end
        self._rows: GuardedRows | None = None

    def __call__(self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocab"]) -> Tensor:
        """The scores, or the guard's in their place."""
        if self._rows is None:
            self._rows = GuardedRows(self._model.model, self._guard, input_ids)
        rows, hidden = input_ids.shape[0], self._model.last_state
        assert hidden is not None, "scores follow on a pass"
        assert len(hidden) == rows, "one row a text: the guard does not follow beams"
        ends = input_ids.new_full((rows,), self._end)
        going = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        words, _, going = self._rows.step(hidden, ends, scores.new_zeros(rows), going)
        words = words.where(going, self._end)
        said = torch.full_like(scores, -torch.inf).scatter(1, words.unsqueeze(1), 0.0)
        return said.where(self._rows.rows.unsqueeze(1), scores)


class GuardedModel(UltrathinkForCausalLM):
    """A model with a harm head, whose `generate` is under a guard.

    Attributes:
        guard: The guard; `guarded_by` makes a class with one.
        end: The token that ends a text.
        last_state: State after the last token that was read, (batch, hidden); None before the first.
    """

    guard: Guard
    end: int

    def __init__(self, config: UltrathinkConfig) -> None:
        super().__init__(config)
        self.last_state: Tensor | None = None
        self.model.register_forward_hook(self._note)

    def _note(self, _module: Any, _arguments: Any, output: Any) -> None:
        self.last_state = output.hidden[:, -1]

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As `GenerationMixin.generate`, one text for each row of the prompts."""
        words = GuardedWords(self, self.guard, self.end)
        options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or []), words])
        # The library types `self` as a protocol that no class with an own `generate` meets.
        parent: Any = super()
        return parent.generate(*arguments, **options)


def guarded_by(guard: Guard, end: int) -> type[GuardedModel]:
    """The class whose models are under this guard; `end` is the token that ends a text."""
    return type(UltrathinkForCausalLM.__name__, (GuardedModel,), {"guard": guard, "end": end})
