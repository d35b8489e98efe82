"""A local Hugging Face model as the critic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ultrathink_model.alignment.constitution import cut_answer
from ultrathink_model.alignment.draws import CRITIC, make_generator
from ultrathink_model.config.constitutional import ConstitutionalConfig
from ultrathink_model.errors import CheckpointError

BATCH = 16


class LocalCritic:
    """Any causal model of a folder that `transformers` loads; its chat template is used where it has one.

    Code that lies in the folder is not run; our own architectures need none.

    Args:
        section: `critic_model` is the folder.
        seed: Of the draws.
        device: Where it computes.

    Raises:
        CheckpointError: The folder holds no model and tokenizer.
    """

    def __init__(self, section: ConstitutionalConfig, seed: int, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - takes seconds

        import ultrathink_model.models.hf_auto  # noqa: F401, PLC0415 - the same

        assert section.critic_model is not None, "the config asks for it"
        folder = Path(section.critic_model)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"constitutional.critic_model={folder} holds no config.json; name a Hugging Face model folder."
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval().to(device)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"constitutional.critic_model={folder} cannot be loaded: {error}") from None
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._section, self._seed, self._device = section, seed, device
        self._room = int(self._model.config.max_position_embeddings)

    @torch.no_grad()
    def write(self, texts: Sequence[str], number: int) -> list[str | None]:
        """What the model goes on with; see `Critic`."""
        written: list[str | None] = []
        section = self._section
        for start in range(0, len(texts), BATCH):
            batch = self._encoded(texts[start : start + BATCH], self._room - section.response_tokens)
            # The library draws from the global generator.
            seed = make_generator(self._seed, CRITIC, number + start).initial_seed()
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                torch.manual_seed(seed)
                ids = self._model.generate(
                    **batch,
                    max_new_tokens=section.response_tokens,
                    do_sample=True,
                    temperature=section.temperature,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            new = ids[:, batch["input_ids"].shape[1] :]
            written += [
                cut_answer(text) or None for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)
            ]
        return written

    @torch.no_grad()
    def choose(self, texts: Sequence[str]) -> list[float | None]:
        """The share of A in what the model gives A and B as the next token; see `Critic`."""
        letters = [self._tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "AB"]
        chosen: list[float | None] = []
        for start in range(0, len(texts), BATCH):
            logits = self._model(**self._encoded(texts[start : start + BATCH], self._room)).logits
            chosen += logits[:, -1, letters].float().softmax(-1)[:, 0].tolist()
        return chosen

    def _encoded(self, texts: Sequence[str], room: int) -> Any:
        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in texts
            ]
        tokenizer.truncation_side = "left"
        batch = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=room)
        return {name: batch[name].to(self._device) for name in ("input_ids", "attention_mask")}
