"""`transformers`: a Llama of the shared size under its Trainer and in a bare loop."""

import tempfile
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peers.sizes import BATCH, CLIP, FEED_FORWARD, HEADS, HIDDEN, LAYERS, LEARNING_RATE, LENGTH, VOCAB, draw_rows
from peers.turns import LoopSteps, Step

ENDLESS = 1_000_000


def llama(vocab: int = VOCAB) -> LlamaForCausalLM:
    """The model, with PyTorch's fused attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


class _PassOn(TrainerCallback):
    def __init__(self, pass_on: Callable[[], None]) -> None:
        self._pass_on = pass_on

    def on_step_end(self, *_: object, **__: object) -> None:
        self._pass_on()


class _Rows(torch.utils.data.Dataset):
    """The same few rows again and again."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows[:, :-1]

    def __len__(self) -> int:
        return ENDLESS * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index % len(self._rows)]
        return {"input_ids": row, "labels": row}


def trainer(compiled: bool = False, vocab: int = VOCAB) -> LoopSteps:
    """Steps of `transformers.Trainer` with the fused AdamW."""
    folder = tempfile.mkdtemp(prefix="trainer-")
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        max_steps=ENDLESS,
        learning_rate=LEARNING_RATE,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        torch_compile=compiled,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        train_sampling_strategy="sequential",
    )

    def loop(pass_on: Callable[[], None]) -> None:
        with warnings.catch_warnings(action="ignore"):
            rows = _Rows(draw_rows(vocab=vocab))
            Trainer(llama(vocab), arguments, train_dataset=rows, callbacks=[_PassOn(pass_on)]).train()

    return LoopSteps(loop)


def bare_loop(compiled: bool = False, vocab: int = VOCAB) -> Step:
    """The same Llama in the shortest loop there is."""
    model = llama(vocab)
    tokens = draw_rows(vocab=vocab)[:, :-1]
    run = torch.compile(model) if compiled else model
    return training_step(model, lambda: run(input_ids=tokens, labels=tokens).loss)


def training_step(model: nn.Module, loss_of_batch: Callable[[], Tensor]) -> Step:
    """One step: loss, gradient, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    model.train()

    def step() -> None:
        loss_of_batch().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step
