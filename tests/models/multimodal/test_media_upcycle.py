"""A text model that learns to see and hear, and a multimodal one that goes on."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch

from ultrathink_model.errors import CheckpointError
from ultrathink_model.media.placeholders import MEDIA_TOKENS
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.models.upcycle import initialise_from

SEQ = 40
# As in the other tests of upcycling.
SAME = {"atol": 1e-5, "rtol": 1e-6}


def write_tokenizer(folder: Path, *more: str) -> Path:
    folder.mkdir()
    words = {f"w{number}": number for number in range(90)} | {token: 90 + n for n, token in enumerate(more)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def dense(small_model, tmp_path):
    """A text model and the folder it was saved to."""
    model = small_model()
    save_model(model, write_tokenizer(tmp_path / "words"), tmp_path / "dense")
    return model, tmp_path / "dense"


@pytest.mark.parametrize("overrides", [[], ["advanced.enable_moe=true", "advanced.enable_dre=true"]])
def test_text_loss_is_the_dense_one(dense, media_model, random_tokens, tmp_path, overrides):
    source, folder = dense
    model = media_model("training.seed=7", "advanced.dre_warmup_steps=10", *overrides)
    report = initialise_from(model, folder, write_tokenizer(tmp_path / "more words", *MEDIA_TOKENS))
    tokens, labels = random_tokens(4, SEQ), random_tokens(4, SEQ, seed=1)
    torch.testing.assert_close(model(tokens).logits, source(tokens).logits, **SAME)
    difference = model(tokens, labels=labels).loss_sum - source(tokens, labels=labels).loss_sum
    assert abs(difference) / labels.numel() < 1e-6
    assert "(image_encoder, image_projector, audio_encoder, audio_projector)" in report.summary() or overrides
    assert all(name in report.new for name in model.state_dict() if name.startswith("media_encoder."))


def test_new_weights_learn_from_the_first_step(dense, media_model, some_media, random_tokens):
    model = media_model()
    report = initialise_from(model, dense[1])
    tokens = random_tokens(3, SEQ)
    model.train()(tokens, labels=tokens, media=some_media(model.config, SEQ)).loss_sum.backward()
    weights = dict(model.named_parameters())
    assert report.new
    assert all(weights[name].grad.any() for name in report.new)


def test_vocabulary_may_grow_by_the_media(dense, media_model, random_tokens):
    source, folder = dense
    model = media_model("model.vocab_size=98")
    report = initialise_from(model, folder)
    assert report.new_rows == 2
    assert report.summary().endswith(", and 2 new rows of the embedding")
    tokens = random_tokens(2, SEQ)
    torch.testing.assert_close(model(tokens).logits[..., :96], source(tokens).logits, **SAME)
    with pytest.raises(CheckpointError, match=r"model\.vocab_size=90, 96 there"):
        initialise_from(media_model("model.vocab_size=90"), folder)


def test_only_the_media_may_be_new_words(dense, media_model, tmp_path):
    with pytest.raises(CheckpointError, match="trained with another tokenizer"):
        initialise_from(media_model(), dense[1], write_tokenizer(tmp_path / "other", *MEDIA_TOKENS, "w90"))


@pytest.fixture
def multimodal(media_model, tmp_path):
    """A multimodal model and the folder it was saved to."""
    model = media_model("multimodal.freeze_encoders=true")
    save_model(model, write_tokenizer(tmp_path / "words"), tmp_path / "multimodal")
    return model, tmp_path / "multimodal"


def test_multimodal_model_goes_on(multimodal, media_model, some_media, random_tokens):
    source, folder = multimodal
    model = media_model("training.seed=7")
    report = initialise_from(model, folder)
    assert not report.new
    tokens, media = random_tokens(3, SEQ), some_media(model.config, SEQ)
    assert torch.equal(model(tokens, media=media).logits, source(tokens, media=media).logits)


def test_image_size_may_change(multimodal, media_model):
    model = media_model("multimodal.image_size=20")
    initialise_from(model, multimodal[1])
    images = torch.randn(1, 3, 20, 20)
    expected = multimodal[0].media_encoder.image_encoder(images)
    torch.testing.assert_close(model.media_encoder.image_encoder(images), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("multimodal.audio_layers=1", r"multimodal\.audio_layers=1, 2 there"),
        ("multimodal.audio_stack=2", r"multimodal\.audio_stack=2, 3 there"),
        ("multimodal.image_mean=[0, 0, 0]", r"multimodal\.image_mean=\(0\.0, 0\.0, 0\.0\), \(0\.5, 0\.5, 0\.5\) there"),
        ("advanced.enable_multimodal=false", r"advanced\.enable_multimodal=False, and encoders there"),
    ],
)
def test_what_cannot_go_on_is_refused(multimodal, media_model, override, message):
    with pytest.raises(CheckpointError, match=message):
        initialise_from(media_model(override), multimodal[1])


def test_saved_model_is_read_back_with_no_folder_named(multimodal, some_media, random_tokens):
    source, folder = multimodal
    again = load_model(folder)
    tokens, media = random_tokens(3, SEQ), some_media(source.config, SEQ)
    assert torch.equal(again.eval()(tokens, media=media).logits, source.eval()(tokens, media=media).logits)
    # Without our own config, from what `transformers` reads.
    (folder / "ultrathink.yaml").unlink()
    assert torch.equal(load_model(folder).eval()(tokens, media=media).logits, source(tokens, media=media).logits)
    assert json.loads((folder / "config.json").read_text())["architecture"]["multimodal"]["image_encoder"] is None
