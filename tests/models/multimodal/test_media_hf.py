"""The folder of a multimodal model as `transformers` uses it: processor, logits and generation are ours."""

import io
import json
import subprocess
import sys
import wave

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from ultrathink_model.media.audio import log_mel
from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.media.image import load_image, normalise_image
from ultrathink_model.models import hf_auto  # noqa: F401
from ultrathink_model.models.generation import generate
from ultrathink_model.models.hf import save_model

pytestmark = pytest.mark.shapes_unchecked

TEXT = ["w3 <image> w4 <audio> w5", "<audio> w6 <image> w7 <image>"]
# As for the text model: the same products in another order of batches.
SAME = {"atol": 1e-4, "rtol": 1e-4}


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def sound(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)


@pytest.fixture
def saved(media_model, tmp_path):
    words = {f"w{number}": number for number in range(90)} | {"<pad>": 90, "</s>": 91, "<image>": 92, "<audio>": 93}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<pad>", "</s>", "<image>", "<audio>"])
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(settings))
    model = media_model().eval()
    save_model(model, tmp_path / "words", tmp_path / "folder")
    return model, tmp_path / "folder"


def our_inputs(config, inputs, images, clips) -> MediaBatch:
    """What the loader would make of the same media, with slots written out by hand."""
    options, ids = config.multimodal, inputs["input_ids"]
    image_slots, audio_slots = torch.full_like(ids, -1), torch.full_like(ids, -1)
    image_slots[ids == 92] = torch.arange(int((ids == 92).sum()))
    audio_slots[ids == 93] = torch.arange(int((ids == 93).sum()))
    spectrograms = [torch.from_numpy(log_mel(clip, options)) for clip in clips]
    longest = max(spectrogram.shape[1] for spectrogram in spectrograms)
    return MediaBatch(
        images=torch.stack([torch.from_numpy(normalise_image(load_image(i, options), options)) for i in images]),
        audio=torch.stack([torch.nn.functional.pad(s, (0, longest - s.shape[1])) for s in spectrograms]),
        audio_frames=torch.tensor([spectrogram.shape[1] for spectrogram in spectrograms]),
        image_slots=image_slots,
        audio_slots=audio_slots,
    )


def test_processor_and_model_compute_what_ours_does(saved):
    model, folder = saved
    processor = AutoProcessor.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    images, clips = [png(0), png(1), png(2)], [sound(0.4, 0), sound(0.25, 1)]
    inputs = processor(TEXT, images=[images[:1], images[1:]], audio=clips)
    # An image has 9 tokens; a sound of 0.4 s 40 frames, 20 states and 7 tokens, one of 0.25 s 5.
    assert inputs["attention_mask"].sum(dim=1).tolist() == [3 + 9 + 7, 2 + 5 + 2 * 9]
    assert inputs["pixel_values"].shape == (2, 2, 3, 12, 12)
    assert inputs["feature_frames"].tolist() == [[40], [25]]
    mask, media = inputs["attention_mask"].bool(), our_inputs(model.config, inputs, images, clips)
    with torch.no_grad():
        expected = model(inputs["input_ids"], attention_mask=mask, media=media).logits
        torch.testing.assert_close(theirs(**inputs).logits[mask], expected[mask], **SAME)
    text = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ours = generate(
        model, inputs["input_ids"], attention_mask=mask, media=media, max_new_tokens=6, temperature=0.0, pad_token_id=90
    )
    assert torch.equal(text[:, -6:], ours.tokens)
    without_cache = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(without_cache, text)
    beams = theirs.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    alone = theirs.generate(
        **processor(TEXT[1], images=images[1:], audio=clips[1]), max_new_tokens=4, num_beams=2, do_sample=False
    )
    assert torch.equal(beams[1, -4:], alone[0, -4:])


def test_media_may_be_paths_bytes_or_in_memory(saved, tmp_path):
    processor = AutoProcessor.from_pretrained(saved[1])
    (tmp_path / "image.png").write_bytes(png(0))
    samples = (sound(0.3, 0) * 2**15).astype(np.int16)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    variants = [
        (png(0), (tmp_path / "sound.wav").read_bytes()),
        (tmp_path / "image.png", str(tmp_path / "sound.wav")),
        (Image.open(tmp_path / "image.png"), samples.astype(np.float32) / 2**15),
    ]
    first, *others = (processor(TEXT[0], images=image, audio=clip) for image, clip in variants)
    for other in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-5)


def test_wrong_media_are_refused(saved):
    processor = AutoProcessor.from_pretrained(saved[1])
    with pytest.raises(ValueError, match="images: 1 were given, and the text has 2 times <image>"):
        processor("<image> <image>", images=png(0))
    with pytest.raises(ValueError, match="audio: samples of shape"):
        processor("<audio>", audio=np.zeros((2, 100), dtype=np.float32))


STRANGER = """
import sys
sys.modules["ultrathink_model"] = None
import numpy as np
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model) is type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True))
inputs = processor("w3 <image> w4 <audio>", images=Image.new("RGB", (20, 30)), audio=np.zeros(4_000, dtype=np.float32))
print(processor.decode(model.generate(**inputs, max_new_tokens=3, do_sample=False)[0]))
"""


def test_clean_process_loads_processor_and_model(saved, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(saved[1])],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w3 <image>")
