"""litgpt, which wants an older huggingface-hub than ours and so has a folder of its own (`make bench` fills it)."""

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from peers.hugging_face import training_step
from peers.sizes import FEED_FORWARD, HEADS, HIDDEN, LAYERS, LENGTH, VOCAB, draw_rows
from peers.turns import Step

FOLDER = Path(sys.prefix) / "peers"


def is_there() -> bool:
    """Whether the folder holds litgpt."""
    return (FOLDER / "litgpt").is_dir()


class LitModel(nn.Module):
    """Litgpt's Llama; `forward` gives the mean of its cross-entropy over all targets."""

    def __init__(
        self, vocab: int, length: int, layers: int, heads: int, width: int, feed_forward: int, tied: bool = False
    ) -> None:
        super().__init__()
        if str(FOLDER) not in sys.path:
            sys.path.append(str(FOLDER))
        with warnings.catch_warnings(action="ignore"):
            from litgpt import GPT, Config  # noqa: PLC0415
            from litgpt.utils import chunked_cross_entropy  # noqa: PLC0415
        self._loss = chunked_cross_entropy
        config = Config(
            block_size=length,
            vocab_size=vocab,
            padded_vocab_size=vocab,
            n_layer=layers,
            n_head=heads,
            n_query_groups=heads,
            n_embd=width,
            intermediate_size=feed_forward,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
        decoder = GPT(config)
        if tied:
            decoder.lm_head.weight = decoder.transformer.wte.weight
        self.decoder: nn.Module = decoder

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        return self._loss(self.decoder(inputs), targets, chunk_size=0)


def litgpt_loop(compiled: bool = False, vocab: int = VOCAB) -> Step:
    """Litgpt's model and its cross-entropy in its pretraining step, with the fused AdamW."""
    torch.manual_seed(0)
    model = LitModel(vocab, LENGTH, LAYERS, HEADS, HIDDEN, FEED_FORWARD)
    if compiled:
        model.decoder = torch.compile(model.decoder)
    rows = draw_rows(vocab=vocab)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return training_step(model, lambda: model(tokens, labels))
