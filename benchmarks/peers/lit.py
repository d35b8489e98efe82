"""litgpt, which wants an older huggingface-hub than ours and so has a folder of its own (`make bench` fills it)."""

import sys
import warnings
from pathlib import Path

import torch

from peers.hugging_face import training_step
from peers.sizes import FEED_FORWARD, HEADS, HIDDEN, LAYERS, LENGTH, VOCAB, draw_rows
from peers.turns import Step

FOLDER = Path(sys.prefix) / "peers"


def is_there() -> bool:
    """Whether the folder holds litgpt."""
    return (FOLDER / "litgpt").is_dir()


def litgpt_loop(compiled: bool = False, vocab: int = VOCAB) -> Step:
    """Litgpt's model and its cross-entropy in its pretraining step, with the fused AdamW."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    with warnings.catch_warnings(action="ignore"):
        from litgpt import GPT, Config  # noqa: PLC0415
        from litgpt.utils import chunked_cross_entropy  # noqa: PLC0415
    torch.manual_seed(0)
    config = Config(
        block_size=LENGTH,
        vocab_size=vocab,
        padded_vocab_size=vocab,
        n_layer=LAYERS,
        n_head=HEADS,
        n_query_groups=HEADS,
        n_embd=HIDDEN,
        intermediate_size=FEED_FORWARD,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    rows = draw_rows(vocab=vocab)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    run = torch.compile(model) if compiled else model
    return training_step(model, lambda: chunked_cross_entropy(run(tokens), labels, chunk_size=0))
