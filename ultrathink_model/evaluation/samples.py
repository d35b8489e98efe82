"""Sample texts: what the model writes after the beginnings of held-out sentences."""

import re

import numpy as np
import torch
from torch import Tensor

from ultrathink_model.config.evaluation import EvaluationConfig
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.shards import TokenStream
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.evaluation.result import Sample
from ultrathink_model.models.generation import generate
from ultrathink_model.models.transformer import Transformer

PROMPT_TOKENS = 32
# A prompt is looked for in this many times its length: enough that a sentence begins there.
SEARCHED = 6
SENTENCE_END = re.compile(r"[.!?]['\")\]]?\s+(?=\S)")


def held_out_prompts(
    manifest: DataManifest, tokenizer: Tokenizer, count: int, length: int, seed: int
) -> list[list[int]]:
    """Beginnings of sentences from random places of the validation split, the same for the same seed.

    Args:
        manifest: The prepared data.
        tokenizer: The tokenizer that it was prepared with.
        count: Number of prompts.
        length: Most tokens of one.
        seed: Decides the places.

    Returns:
        Token ids of each; a place where no text follows gives the end-of-text token, which opens a document.
    """
    random = np.random.default_rng(seed)
    streams = [
        TokenStream(manifest.path, source.shards["validation"], manifest.token_dtype) for source in manifest.sources
    ]
    bounds = np.cumsum([0, *(len(stream) for stream in streams)])
    prompts = []
    for place in random.integers(0, bounds[-1], size=count):
        number = int(np.searchsorted(bounds, place, side="right")) - 1
        start = int(place - bounds[number])
        stop = min(start + SEARCHED * length, len(streams[number]))
        tokens, ends = streams[number].read(start, stop)
        # Just before the end of a document its end-of-text token stands.
        inside = tokens[: ends[0] - 1] if ends.size else tokens
        prompts.append(
            tokenizer.encode(_from_sentence(tokenizer.decode(inside.tolist())))[:length] or [manifest.eos_id]
        )
    return prompts


def generate_samples(
    model: Transformer, tokenizer: Tokenizer, manifest: DataManifest, settings: EvaluationConfig, seed: int
) -> list[Sample]:
    """Texts that the model writes after held-out prompts; prompts and draws follow from `seed` alone."""
    if not settings.num_generations:
        return []
    length = min(PROMPT_TOKENS, max(1, model.config.model.max_seq_length // 2))
    prompts = held_out_prompts(manifest, tokenizer, settings.num_generations, length, seed)
    ids, mask = _left_padded(prompts, manifest.pad_id, model.output_weight.device)
    generation = generate(
        model,
        ids,
        attention_mask=None if mask.all() else mask,
        max_new_tokens=settings.generation_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_token_ids=[manifest.eos_id],
        pad_token_id=manifest.pad_id,
        generator=torch.Generator().manual_seed(seed),
    )
    rows = zip(prompts, generation.tokens, generation.mask, strict=True)
    return [
        Sample(prompt=tokenizer.decode(prompt), text=tokenizer.decode(tokens[valid].tolist()))
        for prompt, tokens, valid in rows
    ]


def _from_sentence(text: str) -> str:
    """The text from its first sentence on; from its first whole word where no sentence begins in it."""
    found = SENTENCE_END.search(text) or re.search(r"\s+(?=\S)", text)
    return text[found.end() :] if found else text


def _left_padded(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[column >= longest - len(prompt) for column in range(longest)] for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
