"""Peak memory of training steps, each contender in a process of its own: `python benchmarks/memory.py`.

At vocabularies of 32,000 and 100,352: most memory of two training steps of the shared decoder of ours and of peers, over
what the process held before it made the model. Then gradient checkpointing: the seconds it costs, and how much of the
activation memory it frees, which is the most memory of a step over that of a step on a single short row.
"""

import argparse
import os
import resource
import subprocess
import sys
from statistics import median

import torch
from peers import lit
from peers.hugging_face import bare_loop, trainer
from peers.ours import our_trainer
from peers.research import research_loop
from peers.sizes import our_config
from peers.turns import Step, alternate, ratio

VOCABULARIES = (32_000, 100_352)
STEPS = {
    "ultrathink": lambda vocab: our_trainer(our_config(vocab=vocab)),
    "transformers.Trainer": lambda vocab: trainer(vocab=vocab),
    "bare loop": lambda vocab: bare_loop(vocab=vocab),
    "litgpt": lambda vocab: lit.litgpt_loop(vocab=vocab),
    "research loop": lambda vocab: research_loop(vocab=vocab),
}
DEEP = ("model.num_layers=16", "training.batch_size=16")
CHECKPOINTING = {"off": "model.gradient_checkpointing=false", "on": "model.gradient_checkpointing=true"}


def most_memory() -> float:
    """The most bytes that this process ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(make_step: str) -> None:
    """In a child process: prints the bytes that making the step and taking it twice added to the most memory."""
    kind, *parts = make_step.split("/")
    before = most_memory()
    step: Step
    if kind == "vocab":
        step = STEPS[parts[0]](int(parts[1]))
    else:
        step = our_trainer(our_config(*DEEP, CHECKPOINTING[parts[0]], *parts[1:]))
    for _ in range(2):
        step()
    print("bytes", most_memory() - before)


def in_child(make_step: str) -> float:
    """MiB that `measure` found in a process of its own."""
    command = [sys.executable, __file__, "--measure", make_step, "--threads", str(torch.get_num_threads())]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return float(next(line for line in lines if line.startswith("bytes")).split()[1]) / 2**20


def compare_vocabularies() -> None:
    for vocab in VOCABULARIES:
        for name in STEPS:
            if name != "litgpt" or lit.is_there():
                print(f"vocabulary {vocab:7,}  {name:22} {in_child(f'vocab/{name}/{vocab}'):8,.0f} MiB")


def compare_checkpointing(rounds: int) -> None:
    activations = {}
    for name in CHECKPOINTING:
        whole = in_child(f"deep/{name}")
        rest = in_child(f"deep/{name}/training.batch_size=1/model.max_seq_length=8")
        activations[name] = whole - rest
        print(f"checkpointing {name:4} {whole:8,.0f} MiB, of which activations {activations[name]:8,.0f} MiB")
    steps = {name: our_trainer(our_config(*DEEP, switch)) for name, switch in CHECKPOINTING.items()}
    seconds = alternate(steps, rounds, warmup=1)
    print(
        f"checkpointing costs {ratio(seconds['on'], seconds['off']) - 1:.1%} of {median(seconds['off']):.2f} s "
        f"and frees {1 - activations['on'] / activations['off']:.1%} of the activations"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of the steps that are timed")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of each product")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        measure(arguments.measure)
        return
    compare_vocabularies()
    compare_checkpointing(arguments.rounds)


if __name__ == "__main__":
    main()
