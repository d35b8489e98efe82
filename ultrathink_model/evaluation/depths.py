"""How deep the reasoning engine reads a held-out text, token by token."""

import torch

from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.evaluation.result import ReadPiece
from ultrathink_model.evaluation.samples import held_out_prompts
from ultrathink_model.models.transformer import Transformer

READ_TOKENS = 240
# What a decoder puts where bytes do not yet make a character.
INCOMPLETE = "\ufffd"


@torch.no_grad()
def depth_reading(model: Transformer, tokenizer: Tokenizer, manifest: DataManifest, seed: int) -> list[ReadPiece]:
    """A held-out text, cut into tokens, with the passes that each made; empty where no block is routed in depth.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        manifest: The prepared data.
        seed: Decides the text.
    """
    if not model.config.advanced.enable_dre:
        return []
    length = min(READ_TOKENS, model.config.model.max_seq_length)
    ids = held_out_prompts(manifest, tokenizer, 1, length, seed)[0]
    output = model(torch.tensor([ids], device=model.output_weight.device))
    passes = torch.stack(output.passes).float().mean(dim=0)[0].tolist()  # one number a token
    return depth_pieces(tokenizer, ids, passes)


def depth_pieces(tokenizer: Tokenizer, ids: list[int], passes: list[float]) -> list[ReadPiece]:
    """The text of each token; tokens that hold parts of one character make a piece together."""
    pieces: list[ReadPiece] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if INCOMPLETE not in text or end == len(ids):
            pieces.append(ReadPiece(text=text, passes=sum(passes[start:end]) / (end - start)))
            start = end
    return pieces
