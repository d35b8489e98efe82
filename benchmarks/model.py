"""A training step of ours beside those of other codebases: `python benchmarks/model.py [--rounds N] [--only NAME …]`.

All train a decoder of 6.8 M weights (hidden 256, 6 layers, vocabulary 4,096) in float32 on 8 sequences of 256 tokens,
clip the gradient and take a step of fused AdamW, by turns, in one process. Ours is Qwen3's, with norms on queries and
keys that the Llamas beside it do not have. Our training keeps the memory that it frees, and in one process all do;
`--apart` gives each a process of its own, as in use.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from peers import lit
from peers.hugging_face import bare_loop, trainer
from peers.ours import our_trainer
from peers.research import research_loop
from peers.sizes import BATCH, LENGTH, our_config, step_operations
from peers.turns import ProcessSteps, Step, alternate, ratio, serve, square_product

REFERENCE = "transformers.Trainer"
CONTENDERS: dict[str, Callable[[], Step]] = {
    REFERENCE: trainer,
    "ultrathink": lambda: our_trainer(our_config()),
    "bare loop": bare_loop,
    "litgpt": lit.litgpt_loop,
    "research loop": research_loop,
    f"{REFERENCE}, compiled": lambda: trainer(compiled=True),
    "ultrathink, compiled": lambda: our_trainer(our_config("training.compile=true")),
    "bare loop, compiled": lambda: bare_loop(compiled=True),
    "litgpt, compiled": lambda: lit.litgpt_loop(compiled=True),
    "research loop, compiled": lambda: research_loop(compiled=True),
}


def apart(name: str, threads: int) -> Step:
    """A contender in a process of its own."""
    return ProcessSteps([sys.executable, __file__, "--serve", name, "--threads", str(threads)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which no round begins")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of each product")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders beside the reference")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, of one thread: for a busy machine"
    )
    parser.add_argument("--apart", action="store_true", help="each contender in a process of its own")
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    arguments.threads = 1 if arguments.cpu_time else arguments.threads
    torch.set_num_threads(arguments.threads)
    if arguments.serve:
        serve(CONTENDERS[arguments.serve]())
        return
    chosen = [REFERENCE, *(name for name in arguments.only or CONTENDERS if name != REFERENCE)]
    if not lit.is_there():
        print(f"litgpt is not in {lit.FOLDER}: `make bench` puts it there")
        chosen = [name for name in chosen if not name.startswith("litgpt")]
    product, operations = square_product()
    steps = {name: apart(name, arguments.threads) if arguments.apart else CONTENDERS[name]() for name in chosen}
    seconds = alternate({"peak": product} | steps, arguments.rounds, limit=arguments.limit, clock=clock)
    peak = operations / median(seconds["peak"])
    print(
        f"{arguments.threads} threads; matrix products of 2048 × 2048: {peak / 1e9:.0f} GFLOP/s; {len(seconds['peak'])} rounds"
    )
    print(f"{'':32} {'ms/step':>8} {'tokens/s':>9} {'speed':>6} {'share of peak':>14}")
    for name in chosen:
        step = median(seconds[name])
        share = ratio(seconds["peak"], seconds[name]) * step_operations() / operations
        speed = ratio(seconds[REFERENCE], seconds[name])
        print(f"{name:32} {1e3 * step:8.1f} {BATCH * LENGTH / step:9,.0f} {speed:6.3f} {share:14.1%}")


if __name__ == "__main__":
    main()
