"""Whole training runs beside other ways to train, as ratios within one run of this file.

    python benchmarks/training.py engine       what our loop costs over the bare model step
    python benchmarks/training.py ranks        two gloo ranks with a thread each, beside one process with two
    python benchmarks/training.py checkpoints  what a save costs, and how long training waits for it
    python benchmarks/training.py peers        transformers.Trainer, litgpt and a GPT-2 in a plain loop, from the command line

Without a word: all of them. `--size 7M|50M` picks the decoder; `--steps` the steps of each run; `--only` some contenders.
"""

import argparse
import itertools
import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import lit
from peers.turns import LoopSteps, Step, WholeRun, alternate, ratio
from torch import nn

from ultrathink_model.config import Config, make_config
from ultrathink_model.config.load import save_config
from ultrathink_model.data import DataManifest, TrainLoader, prepare_data
from ultrathink_model.distributed.context import RankContext, init_distributed
from ultrathink_model.models.transformer import build_model
from ultrathink_model.tracking.metrics import MetricsWriter, read_metrics
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.assembly import compile_model, make_trainer
from ultrathink_model.training.callbacks.callback import Callback
from ultrathink_model.training.callbacks.metrics import MetricsCallback
from ultrathink_model.training.optimizer import make_optimizer
from ultrathink_model.training.run import train
from ultrathink_model.training.signals import StopSignals
from ultrathink_model.training.throughput import Throughput
from ultrathink_model.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).resolve().parent / "peers"
SIZES = {
    "7M": {
        "hidden_size": 256,
        "num_layers": 6,
        "num_heads": 4,
        "intermediate_size": 688,
        "vocab_size": 4096,
        "tie_embeddings": False,
    },
    "50M": {
        "hidden_size": 576,
        "num_layers": 12,
        "num_heads": 9,
        "intermediate_size": 1536,
        "vocab_size": 8192,
        "tie_embeddings": True,
    },
}
CONTENDERS = ["Trainer", "ultrathink", "litgpt", "GPT-2 loop"]
COMPILED = ", compiled"
SEQUENCE_LENGTH = 256
EVAL_SEQUENCES = 16
# The first steps choose kernels and fill caches.
WARM_STEPS = 3


def make_run(arguments: argparse.Namespace, folder: Path, **training: Any) -> Config:
    """The config of a run on the built-in corpus."""
    return make_config(
        {
            "model": {**SIZES[arguments.size], "max_seq_length": SEQUENCE_LENGTH},
            "training": {
                "batch_size": arguments.sequences,
                "max_steps": arguments.steps,
                "num_epochs": 99,
                "optimizer": "adamw",
                **training,
            },
            "data": {
                "dataset": "sotu",
                "tokenizer_name": "train",
                "cache_dir": str(arguments.data or arguments.folder / "data"),
                # Three speeches: a run ends with a validation on all that is held out, which nobody here waits for.
                "validation_every": 60,
            },
            "evaluation": {"eval_samples": EVAL_SEQUENCES, "eval_frequency": 99},
            "logging": {"use_mlflow": False, "log_steps": 1, "log_level": "INFO"},
            "output": {"output_dir": str(folder)},
        }
    )


def step_seconds(folder: Path) -> list[float]:
    """Seconds of each step of a run after the first ones."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train/step_seconds" in row]
    return [row["train/step_seconds"] for row in rows[WARM_STEPS:]]


def bare_step(config: Config, manifest: DataManifest) -> Step:
    """Nothing but forward, backward, clipping and the optimizer, on rows that are there already."""
    model = build_model(config).train()
    compile_model(model, config, init_distributed(config))
    optimizer = make_optimizer(config.training, model)
    batches = itertools.cycle(list(itertools.islice(TrainLoader(manifest, config), 8)))

    def step() -> None:
        batch = next(batches)[0]
        output = model(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids)
        assert output.loss_sum is not None
        (output.loss_sum / batch.num_tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class PassOn(Callback):
    """Lets the other side have its turn after each step."""

    def __init__(self, pass_on: Callable[[], None]) -> None:
        self._pass_on = pass_on

    def on_step_end(self, trainer: Trainer) -> None:  # noqa: D102
        self._pass_on()


def whole_loop(config: Config, manifest: DataManifest) -> LoopSteps:
    """Our loop with everything that a run has around a step: data, metrics, validation, saving."""
    context, folder = init_distributed(config), RunFolder(config.output.output_dir)
    metrics = MetricsCallback(config.logging.log_steps)
    metrics.writer = MetricsWriter(folder.metrics_file)
    trainer = make_trainer(config, context, manifest, folder, StopSignals(), metrics, None, None)

    def loop(pass_on: Callable[[], None]) -> None:
        trainer.callbacks = [*trainer.callbacks, PassOn(pass_on)]
        trainer.fit()

    return LoopSteps(loop)


def engine(arguments: argparse.Namespace) -> None:
    """Our loop over the bare step, in turns, so that both meet the same machine."""
    config = make_run(arguments, arguments.folder / "engine", max_steps=arguments.steps + 9)
    config = make_config({**config.model_dump(), "logging": {**config.logging.model_dump(), "log_steps": 10}})
    manifest = prepare_data(config)
    sides = {"bare": bare_step(config, manifest), "ours": whole_loop(config, manifest)}
    seconds = alternate(sides, arguments.steps)
    bare, ours = statistics.median(seconds["bare"]), statistics.median(seconds["ours"])
    peak = Throughput.of(config, RankContext(0, 0, 1, torch.device("cpu")))
    print(
        f"engine {arguments.size}: bare step {bare:.4f} s, in the whole loop {ours:.4f} s: ratio "
        f"{ratio(seconds['ours'], seconds['bare']):.4f}; matrix products reach {peak.peak / 1e9:.0f} GFLOP/s, MFU "
        f"{peak.utilisation(arguments.sequences * SEQUENCE_LENGTH / ours):.1%}"
    )


def checkpoints(arguments: argparse.Namespace) -> None:
    """What a save takes, and what of it training waits for, as the log of a run says it."""
    for in_background in (True, False):
        folder = arguments.folder / f"checkpoints_{in_background}"
        config = make_run(arguments, folder, checkpoint_steps=5, async_checkpoints=in_background)
        train(config, manifest=prepare_data(config), run_name="checkpoints")
        log = (folder / "training.log").read_text()
        saved = [float(text) for text in re.findall(r"saved checkpoint_\d+\.pt in ([\d.]+) s", log)]
        waited = [float(text) for text in re.findall(r"training waited ([\d.]+) s", log)] or saved
        size = sum(file.stat().st_size for file in next(folder.glob("checkpoint_*.pt")).iterdir())
        median = statistics.median(waited)
        print(
            f"checkpoints {arguments.size}, in the background {in_background}: {size / 1e6:.0f} MB in "
            f"{statistics.median(saved):.2f} s, of which training waits {median:.3f} s: {median / 600:.3%} of 10 minutes"
        )


def ranks(arguments: argparse.Namespace) -> None:
    """Two gloo ranks with a thread each, beside one process with two threads, on the same global batch."""
    rates = {}
    for count in (1, 2):
        folder = arguments.folder / f"ranks{count}"
        config = make_run(arguments, folder, batch_size=arguments.sequences // count)
        distributed = {"enabled": count > 1, "num_processes": count}
        config = make_config({**config.model_dump(), "distributed": distributed})
        run_ours(config, folder, threads=2 // count)
        rates[count] = arguments.sequences * SEQUENCE_LENGTH / statistics.median(step_seconds(folder))
    print(
        f"ranks {arguments.size}: one process with two threads {rates[1]:.0f} tokens/s, two ranks with one "
        f"{rates[2]:.0f}: ratio {rates[2] / rates[1]:.3f}"
    )


def peers(arguments: argparse.Namespace) -> None:
    """Whole runs from the command line, in turns: data, logging, evaluations and checkpoints included.

    Each runs for some seconds while the others are stopped. Its clock, of its own turns only, goes from the step after
    the first evaluation and checkpoint, where all is compiled, to the last step before the third: ours says that it ended a
    step after its evaluation, and at the end evaluates on the whole validation split, which the others do not.
    """
    if not lit.is_there():
        print(f"litgpt is not in {lit.FOLDER}: `make bench` puts it there")
        arguments.only = [name for name in arguments.only if not name.startswith("litgpt")]
    folder = arguments.folder / "peers"
    folder.mkdir()
    manifest = prepare_data(make_run(arguments, folder / "data"))
    first, last = arguments.steps // 3 + 1, 3 * (arguments.steps // 3) - 1
    runs: dict[str, WholeRun] = {}
    try:
        for name in arguments.only:
            command = _contender(arguments, name, folder / re.sub(r"\W", "_", name), manifest)
            runs[name] = WholeRun([sys.executable, "-W", "ignore", *command], _environment(arguments.threads), ROOT)
        while waiting := [run for run in runs.values() if not run.is_done]:
            for run in waiting:
                run.take_turn(arguments.turn)
    finally:
        for run in runs.values():
            run.end()
    tokens = (last - first) * arguments.sequences * SEQUENCE_LENGTH
    rates = {name: tokens / (run.worked[last] - run.worked[first]) for name, run in runs.items()}
    for name, rate in rates.items():
        print(
            f"peers {arguments.size}: {name:22} {rate:7.0f} tokens/s, {rate / rates[arguments.only[0]]:.3f} of "
            f"{arguments.only[0]}; {runs[name].worked[1]:.1f} s to its first step"
        )


def _contender(arguments: argparse.Namespace, name: str, folder: Path, manifest: DataManifest) -> list[str]:
    """The command line of a contender's run."""
    contender, compiled, save_steps = name.removesuffix(COMPILED), name.endswith(COMPILED), arguments.steps // 3
    if contender == "ultrathink":
        run = make_run(arguments, folder, compile=compiled, checkpoint_steps=save_steps)
        run = make_config({**run.model_dump(), "evaluation": {**run.evaluation.model_dump(), "eval_steps": save_steps}})
        return _our_command(run, folder)
    settings = {
        **SIZES[arguments.size],
        "model": contender,
        "data": str(manifest.path),
        "sequence_length": SEQUENCE_LENGTH,
        "sequences": arguments.sequences,
        "steps": arguments.steps,
        "save_steps": save_steps,
        "eval_sequences": EVAL_SEQUENCES,
        "compile": compiled,
        "folder": str(folder),
    }
    script = "hf_trainer.py" if contender == "Trainer" else "plain_loop.py"
    return [str(PEERS / script), json.dumps(settings)]


def run_ours(config: Config, folder: Path, threads: int) -> None:
    """A run of ours by `train_advanced.py`."""
    command = [sys.executable, "-W", "ignore", *_our_command(config, folder)]
    done = subprocess.run(command, env=_environment(threads), capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def _our_command(config: Config, folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    save_config(config, folder.with_suffix(".yaml"))
    return [str(ROOT / "train_advanced.py"), "--config", str(folder.with_suffix(".yaml"))]


def _environment(threads: int) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(PEERS.parent)])
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}


def main() -> None:
    """Parses the command line and measures."""
    parts = {"engine": engine, "checkpoints": checkpoints, "ranks": ranks, "peers": peers}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=parts)
    parser.add_argument("--size", choices=SIZES, default="7M")
    parser.add_argument(
        "--steps", type=int, help="of each run; 120 for peers, whose turns are whole seconds, otherwise 20"
    )
    parser.add_argument("--sequences", type=int, default=8, help="sequences in a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder of prepared data, to prepare them only once")
    parser.add_argument("--turn", type=float, default=5.0, help="peers: seconds of each turn")
    names = [*CONTENDERS, *(name + COMPILED for name in CONTENDERS)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="peers: contenders; the first is 1")
    arguments = parser.parse_args()
    logging.getLogger("ultrathink_model").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    arguments.folder = Path(tempfile.mkdtemp(prefix="ultrathink-bench-"))
    try:
        steps = arguments.steps
        for name in [arguments.part] if arguments.part else parts:
            arguments.steps = steps or (120 if name == "peers" else 20)
            parts[name](arguments)
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
