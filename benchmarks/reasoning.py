"""What the reasoning engine buys on real text: its loss for three quarters of the dense model's training FLOPs.

    python benchmarks/reasoning.py                    # three seeds; about 15 minutes on one core
    python benchmarks/reasoning.py --size micro       # a model of half the width on half the context: 5 minutes
    python benchmarks/reasoning.py --seeds 1 --steps 200 --override dre.compute_budget=0.4

For each seed the dense model is trained on `sotu`, then the same model with the engine, from scratch, for as many steps
as 75 % of the dense run's FLOPs pay for; each run's schedule ends with it. A shallower dense model that costs as much a
step as the engine's is the control: it shows what the choice of tokens is worth beyond leaving blocks out. FLOPs are
those of forward and backward passes by `torch.utils.flop_counter`, attention by its plain formula; the optimizer's are
not counted. Runs are kept in outputs/benchmarks: a cut benchmark goes on where it was.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable

import torch
from small_runs import SIZES, folder_of, tiny_config, trained
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.config import Config, override_config
from ultrathink_model.data import DataManifest, ValidationLoader
from ultrathink_model.models.generation import generate
from ultrathink_model.models.hf import load_model
from ultrathink_model.models.reasoning import DepthRouter
from ultrathink_model.models.transformer import Transformer, build_model

SHARE_OF_FLOPS = 0.75
# A step after every warm-up.
LATE = 10**9
ENGINE = [
    *("advanced.enable_dre=true", "advanced.dre_warmup_steps=20", "dre.layer_frequency=1", "dre.dense_layers=1"),
    *("dre.compute_budget=0.25", "dre.deep_share=0.04", "dre.ultra_deep_share=0.01"),
]
WIDE = ["model.hidden_size=1024", "model.num_layers=8", "model.num_heads=8", "model.intermediate_size=2816"]


def flops_by_step(config: Config) -> Callable[[int], int]:
    """A function that counts the FLOPs of a run's n-th step, 0-based."""
    model = build_model(override_config(config, ["model.use_flash_attention=false"])).train()
    shape = (config.training.batch_size, config.model.max_seq_length)
    tokens = torch.randint(config.model.vocab_size, shape)
    known: dict[tuple[float, ...], int] = {}

    def count(step: int) -> int:
        model.begin_step(step)
        shares = tuple(s for module in model.modules() if isinstance(module, DepthRouter) for s in module.shares)
        if shares not in known:
            with FlopCounterMode(display=False) as counter:
                loss = model(tokens, labels=tokens).loss_sum
                assert loss is not None
                loss.backward()
            known[shares] = counter.get_total_flops()
        return known[shares]

    return count


def affordable_steps(config: Config, budget: float) -> int:
    """The most steps whose FLOPs stay within `budget`."""
    count, steps = flops_by_step(config), 0
    while (budget := budget - count(steps)) >= 0:
        steps += 1
    return steps


def depth_of_same_cost(config: Config, size: list[str]) -> int:
    """The number of blocks with which a dense model's step costs most nearly what one with the engine does at last."""
    cost = flops_by_step(config)(LATE)
    depths = {
        depth: flops_by_step(tiny_config("dense", *size, f"model.num_layers={depth}"))(LATE)
        for depth in range(1, config.model.num_layers + 1)
    }
    return min(depths, key=lambda depth: abs(depths[depth] - cost))


@torch.no_grad()
def agreement(name: str, manifest: DataManifest, sequences: int = 128) -> tuple[float, float]:
    """How generation's routing compares with training's on held-out text.

    Returns:
        The share of tokens, over all routed blocks, with the same number of passes, and the ratio of the perplexities.
    """
    model = load_model(folder_of(name).final_model)
    model.begin_step(LATE)
    same = total = 0.0
    losses = {True: 0.0, False: 0.0}
    tokens = 0
    for batch in ValidationLoader(manifest, model.config, max_sequences=sequences):
        passes = {}
        for training in losses:
            output = model.train(training)(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids)
            losses[training] += float(output.loss_sum)
            passes[training] = torch.stack(output.passes)
        same += float((passes[True] == passes[False]).sum())
        total += passes[True].numel()
        tokens += batch.num_tokens
    return same / total, math.exp((losses[False] - losses[True]) / tokens)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def wide_model(*overrides: str) -> Transformer:
    """A random model in which products of matrices dominate; its routers choose at random, as many as budgeted."""
    model = build_model(tiny_config("wide", *WIDE, *overrides))
    for module in model.modules():
        if isinstance(module, DepthRouter):
            torch.nn.init.normal_(module.router.weight, std=0.1)
    model.train().begin_step(LATE)
    with torch.no_grad():
        model(torch.randint(model.config.model.vocab_size, (4, 256)))
    model.end_step(lambda counts: counts)
    return model


def speed_ratios(engine: list[str], rounds: int = 3) -> tuple[float, float]:
    """Medians of the engine's seconds over the dense model's, alternating: a training step, and 48 tokens written."""
    dense, routed = wide_model(), wide_model(*engine)
    tokens, prompt = torch.randint(dense.config.model.vocab_size, (2, 256)), torch.ones(1, 32, dtype=torch.int64)

    def train_step(model: Transformer) -> None:
        loss = model.train()(tokens, labels=tokens).loss_sum
        assert loss is not None
        loss.backward()

    def write(model: Transformer) -> None:
        generate(model.eval(), prompt, max_new_tokens=48, temperature=1.0, top_p=1.0)

    ratios: dict[Callable[[Transformer], None], list[float]] = {train_step: [], write: []}
    for _ in range(rounds):
        for work, found in ratios.items():
            found.append(
                seconds_of(functools.partial(work, routed)) / seconds_of(functools.partial(work, dense)),
            )
    return statistics.median(ratios[train_step]), statistics.median(ratios[write])


def main() -> None:
    """Trains what is missing, measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=100, help="steps of the dense run")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the engine")
    parser.add_argument("--tag", default="engine", help="name of these settings in the names of the runs")
    parser.add_argument("--control", action="store_true", help="train the shallower dense model too")
    options = parser.parse_args()

    size, tail = SIZES[options.size], f"{options.size}_{options.steps}"
    engine = [*ENGINE, *options.override]
    dense_total = options.steps * flops_by_step(tiny_config("dense", *size))(0)
    runs = {options.tag: engine}
    if options.control:
        depth = depth_of_same_cost(tiny_config(options.tag, *size, *engine), size)
        runs[f"dense{depth}"] = [f"model.num_layers={depth}"]
    budget = SHARE_OF_FLOPS * dense_total
    steps = {name: affordable_steps(tiny_config(name, *size, *overrides), budget) for name, overrides in runs.items()}
    print(f"dense: {options.steps} steps, {dense_total / 1e12:.3f} TFLOPs; for {SHARE_OF_FLOPS:.0%} of these {steps}")
    for seed in options.seeds:
        base = [*size, f"training.seed={seed}"]
        dense, manifest = trained(f"dense_{tail}_{seed}", *base, f"training.max_steps={options.steps}")
        print(f"seed {seed}: dense {dense.metrics['val/loss']:.4f}", flush=True)
        for name, overrides in runs.items():
            folder = f"{name}_{tail}_{seed}"
            result, _ = trained(folder, *base, *overrides, f"training.max_steps={steps[name]}")
            gain = result.metrics["val/loss"] - dense.metrics["val/loss"]
            print(f"seed {seed}: {name} {result.metrics['val/loss']:.4f} ({gain:+.4f})", flush=True)
            if name == options.tag:
                same, ratio = agreement(folder, manifest)
                print(f"  passes as in training {same:.2%} of tokens, perplexity {ratio:.4f} of training's", flush=True)
    training, writing = speed_ratios(engine)
    print(f"seconds over a dense model's of width 1024: training step {training:.3f}, generation {writing:.3f}")


if __name__ == "__main__":
    main()
