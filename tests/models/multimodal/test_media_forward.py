"""Images and sounds in the sequence: in their places, causal, apart from other documents, and harmless."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.models.transformer import build_model
from ultrathink_model.training.optimizer import make_optimizer

SEQ = 40
VARIANTS = {
    "dense": [],
    "mixture": ["advanced.enable_moe=true"],
    "routed": ["advanced.enable_dre=true", "dre.layer_frequency=1"],
    "window": ["model.sliding_window=7"],
}


def changed(media: MediaBatch, part: str, index: int) -> MediaBatch:
    """The media with one image or clip replaced."""
    other = getattr(media, part).clone()
    other[index] = torch.randn_like(other[index])
    return dataclasses.replace(media, **{part: other})


@torch.no_grad()
def logits(model, tokens, media, **options) -> Tensor:
    return model.eval()(tokens, media=media, **options).logits


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_text_sees_media_behind_it_only(media_model, some_media, random_tokens, overrides):
    model, tokens = media_model(*overrides), random_tokens(3, SEQ)
    media = some_media(model.config, SEQ)
    before = logits(model, tokens, media)
    # Image 0 begins at column 2 of row 0, clip 0 at 14; image 1 at column 20 of row 2, clip 1 at 5.
    for part, index, row, column in (
        ("images", 0, 0, 2),
        ("audio", 0, 0, 14),
        ("images", 1, 2, 20),
        ("audio", 1, 2, 5),
    ):
        after = logits(model, tokens, changed(media, part, index))
        others = [other for other in range(3) if other != row]
        assert torch.equal(after[others], before[others])
        assert torch.equal(after[row, :column], before[row, :column])
        assert not torch.equal(after[row, column:], before[row, column:])


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_other_documents_of_the_row_do_not_see_a_medium(media_model, some_media, random_tokens, overrides):
    model, tokens = media_model(*overrides), random_tokens(3, SEQ)
    media = some_media(model.config, SEQ)
    documents = torch.zeros(3, SEQ, dtype=torch.long)
    documents[:, 18:] = 1
    documents[:, 30:] = 2
    before = logits(model, tokens, media, document_ids=documents)
    after = logits(model, tokens, changed(media, "images", 0), document_ids=documents)
    assert torch.equal(after[0, 18:], before[0, 18:])
    assert not torch.equal(after[0, 11:18], before[0, 11:18])


def test_placeholder_tokens_do_not_matter(media_model, some_media, random_tokens):
    model, tokens = media_model(), random_tokens(3, SEQ)
    media = some_media(model.config, SEQ)
    other = tokens.where((media.image_slots < 0) & (media.audio_slots < 0), 0)
    assert not torch.equal(tokens, other)
    assert torch.equal(logits(model, tokens, media), logits(model, other, media))


def test_each_token_takes_its_own_state(media_model, some_media):
    model = media_model().eval()
    media = some_media(model.config, SEQ)
    encoder = model.media_encoder
    with torch.no_grad():
        placed = encoder(torch.zeros(3, SEQ, 32), media)
        patches = encoder.image_projector(encoder.image_encoder(media.images)).flatten(0, 1)
        for row, column in (media.image_slots >= 0).nonzero().tolist():
            assert torch.equal(placed[row, column], patches[media.image_slots[row, column]])
        assert not placed[1].any()
        # A clip alone, without the padding to the longest, has the same states.
        for clip, (row, column, count) in enumerate(((0, 14, 6), (2, 5, 3))):
            frames = media.audio_frames[clip : clip + 1]
            states, inside = encoder.audio_encoder(media.audio[clip : clip + 1, :, : int(frames)], frames)
            stacked, counts = encoder._stacked(states, inside)
            assert counts.tolist() == [count]
            expected = encoder.audio_projector(stacked)[0]
            torch.testing.assert_close(placed[row, column : column + count], expected, atol=1e-5, rtol=1e-5)


def test_a_medium_may_be_cut_by_a_row(media_model, some_media, random_tokens):
    """A run of tokens that ends a row goes on in the next, where the same image is encoded again."""
    model, tokens = media_model(), random_tokens(1, 12)
    whole = dataclasses.replace(some_media(model.config, SEQ), audio=None, audio_frames=None, audio_slots=None)
    slots = torch.cat((torch.full((3,), -1), torch.arange(9))).unsqueeze(0)
    with torch.no_grad():
        placed = model.media_encoder(model.embedding(tokens), dataclasses.replace(whole, image_slots=slots))
        cut = model.media_encoder(
            model.embedding(tokens.view(2, 6)), dataclasses.replace(whole, image_slots=slots.view(2, 6))
        )
    assert torch.equal(placed.view(2, 6, -1), cut)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("mode", ["whole", "selective"])
def test_gradients_reach_every_weight(media_model, some_media, random_tokens, checkpointing, mode):
    model = media_model(f"model.gradient_checkpointing={checkpointing}", f"model.gradient_checkpointing_mode={mode}")
    media, tokens = some_media(model.config, SEQ), random_tokens(3, SEQ)
    model.train()(tokens, labels=tokens, media=media).loss_sum.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


def test_frozen_encoders_keep_no_gradient(media_model, some_media, random_tokens):
    model = media_model("multimodal.freeze_encoders=true")
    media, tokens = some_media(model.config, SEQ), random_tokens(3, SEQ)
    model.train()(tokens, labels=tokens, media=media).loss_sum.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == ("_encoder." in name.removeprefix("media_encoder.")), name


def test_text_weights_are_those_of_the_model_without_encoders(media_config, small_config):
    plain, media = build_model(small_config()), build_model(media_config())
    weights = dict(media.named_parameters())
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert all(weight.isfinite().all() for weight in weights.values())


def test_text_alone_is_the_model_without_encoders(media_model, small_model, random_tokens):
    tokens = random_tokens(2, SEQ)
    assert torch.equal(logits(media_model(), tokens, None), logits(small_model(), tokens, None))


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_encoders_that_a_step_does_not_use(media_model, some_media, random_tokens, optimizer_name):
    model = media_model(f"training.optimizer={optimizer_name}", "training.weight_decay=0.0")
    optimizer = make_optimizer(model.config.training, model)
    tokens = random_tokens(3, SEQ)

    def step(media, seen):
        before = {name: weight.detach().clone() for name, weight in model.media_encoder.named_parameters()}
        optimizer.zero_grad()
        model(tokens, labels=tokens, media=media).loss_sum.backward()
        model.complete_gradients(seen)
        optimizer.step()
        moved = {
            name for name, weight in model.media_encoder.named_parameters() if not torch.equal(weight, before[name])
        }
        return {kind: any(name.startswith(kind) for name in moved) for kind in ("image", "audio")}

    media = some_media(model.config, SEQ)
    assert step(media, ["image", "audio"]) == {"image": True, "audio": True}
    # What is left of their momentum moves them on under AdamW, as it does where ranks must all make the same calls.
    goes_on = optimizer_name == "adamw"
    silent = dataclasses.replace(media, audio=None, audio_frames=None, audio_slots=None)
    assert step(silent, ["image"]) == {"image": True, "audio": goes_on}
    assert step(None, []) == {"image": goes_on, "audio": goes_on}
    # Another rank had a sound: here, too, the momentum goes on.
    assert step(None, ["audio"]) == {"image": goes_on, "audio": True}
