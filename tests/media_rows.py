"""A small dataset of texts with images and sounds, and the config that reads it."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ultrathink_model.config import Config, make_config
from ultrathink_model.data.digits import as_wav

ROWS = 40
VALUES = {
    "model": {"vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_length": 32},
    "advanced": {"enable_multimodal": True},
    "multimodal": {
        "image_size": 16,
        "patch_size": 4,
        "image_hidden_size": 16,
        "image_layers": 1,
        "image_heads": 2,
        "audio_hidden_size": 16,
        "audio_layers": 1,
        "audio_heads": 2,
        "mel_bins": 16,
        "max_audio_seconds": 2.0,
    },
    "training": {"batch_size": 4, "max_steps": 6},
    "data": {"tokenizer_name": "train", "max_quarantine_fraction": 0.5},
    "logging": {"use_mlflow": False},
}


def media_config(folder: Path, *overrides: str) -> Config:
    paths = [f"output.output_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}"]
    return make_config(VALUES, [*paths, *overrides])


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (number % 256, 255 - number % 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def wav(number: int) -> bytes:
    # Of another length and pitch each: (number % 5 + 1) · 80 ms are 1 to 5 tokens of 80 ms.
    time = np.arange((number % 5 + 1) * 640) / 8_000
    return as_wav(0.3 * np.sin(2 * np.pi * (300 + 20 * number) * time), 8_000)


def write_rows(folder: Path, rows: int = ROWS) -> Path:
    """A JSON Lines file of rows with an image, a sound, both or neither, beside the files that they name."""
    (folder / "media").mkdir(parents=True)
    lines = []
    for number in range(rows):
        image, sound = f"media/{number}.png", f"media/{number}.wav"
        (folder / image).write_bytes(png(number))
        (folder / sound).write_bytes(wav(number))
        text, media = [
            (f"number {number}: <image> was a picture", {"images": [image]}),
            (f"<audio> was sound number {number}", {"audio": [sound]}),
            (f"both <audio> and <image> and <image> of {number}", {"images": [image, "media/0.png"], "audio": [sound]}),
            (f"neither of them in number {number}", {}),
        ][number % 4]
        lines.append(json.dumps({"text": text} | media))
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
