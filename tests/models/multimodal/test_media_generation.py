"""Generation after images and sounds."""

import dataclasses

import pytest
import torch

from ultrathink_model.models.generation import generate

SEQ = 30
VARIANTS = {
    "dense": [],
    "window": ["model.sliding_window=7"],
    "routed mixture": ["advanced.enable_dre=true", "advanced.enable_moe=true", "dre.layer_frequency=1"],
}
OPTIONS = {"max_new_tokens": 10, "temperature": 0.0}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_cache_gives_the_tokens_of_a_full_pass(media_model, some_media, random_tokens, overrides):
    model, prompts = media_model(*overrides), random_tokens(3, SEQ)
    media = some_media(model.config, SEQ)
    mask = torch.ones(3, SEQ, dtype=torch.bool)
    mask[1, :12] = False
    mask[2, :5] = False
    cached = generate(model, prompts, attention_mask=mask, media=media, **OPTIONS)
    full = generate(model, prompts, attention_mask=mask, media=media, use_cache=False, **OPTIONS)
    assert torch.equal(cached.tokens, full.tokens)
    torch.testing.assert_close(cached.logprobs, full.logprobs, atol=1e-4, rtol=1e-4)
    blind = generate(model, prompts, attention_mask=mask, **OPTIONS)
    assert not torch.equal(cached.logprobs[[0, 2]], blind.logprobs[[0, 2]])
    torch.testing.assert_close(cached.logprobs[1], blind.logprobs[1])


def test_left_padding_changes_nothing(media_model, some_media, random_tokens):
    model, prompts = media_model(), random_tokens(3, SEQ)
    media = some_media(model.config, SEQ)
    mask = torch.ones(3, SEQ, dtype=torch.bool)
    mask[2, :5] = False
    batch = generate(model, prompts, attention_mask=mask, media=media, **OPTIONS)
    # Row 2 alone and unpadded, with the second image and the second clip.
    alone = dataclasses.replace(
        media,
        images=media.images[1:],
        audio=media.audio[1:],
        audio_frames=media.audio_frames[1:],
        image_slots=(media.image_slots[2:, 5:] - 9).clamp_min(-1),
        audio_slots=(media.audio_slots[2:, 5:] - 6).clamp_min(-1),
    )
    again = generate(model, prompts[2:, 5:], media=alone, **OPTIONS)
    assert torch.equal(batch.tokens[2], again.tokens[0])
    torch.testing.assert_close(batch.logprobs[2], again.logprobs[0], atol=1e-4, rtol=1e-4)
