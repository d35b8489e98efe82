"""`transformers.Trainer` with a Llama of the size that the settings name; prints each step that it ends.

Run as `python hf_trainer.py SETTINGS`, with the JSON that `benchmarks/training.py` makes. Fused AdamW, the same rows in
the same number of steps, an evaluation and a checkpoint every so many.
"""

import json
import sys
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ultrathink_model.data import load_manifest
from ultrathink_model.data.loader import SplitReader


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of the prepared data, as the Trainer takes them."""

    def __init__(self, folder: str, split: Any, count: int) -> None:
        self._reader, self._count = SplitReader(load_manifest(folder), split), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._reader.batch([(0, index)]).input_ids[0]
        return {"input_ids": ids, "labels": ids}


class Teller(TrainerCallback):
    """Says when a step ends."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        print(f"step {state.global_step}/", flush=True)


def main() -> None:
    """Trains."""
    settings = json.loads(sys.argv[1])
    torch.manual_seed(0)
    heads = settings["num_heads"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings["vocab_size"],
            hidden_size=settings["hidden_size"],
            intermediate_size=settings["intermediate_size"],
            num_hidden_layers=settings["num_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=settings["sequence_length"],
            tie_word_embeddings=settings["tie_embeddings"],
            attn_implementation="sdpa",
        )
    )
    steps, sequences = settings["steps"], settings["sequences"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=settings["folder"],
            per_device_train_batch_size=sequences,
            per_device_eval_batch_size=8,
            max_steps=steps,
            learning_rate=3e-4,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_steps=settings["save_steps"],
            eval_strategy="steps",
            eval_steps=settings["save_steps"],
            report_to=[],
            disable_tqdm=True,
            torch_compile=settings["compile"],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Rows(settings["data"], "train", steps * sequences),
        eval_dataset=Rows(settings["data"], "validation", settings["eval_sequences"]),
        callbacks=[Teller()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
