"""What encoders for images and sound cost a step of text: the training step of a model with them beside one without.

    python benchmarks/media_cost.py --steps 40

Both models make the same steps on the same tokens, turn and turn about, and the seconds of processor time of each step
are compared pair by pair, so that other work on the machine falls on both. A step is a forward and a backward pass and
the optimizer's; AdamW moves the idle encoders along, Muon leaves them. Forward and backward passes are the same code in both, so what
comes behind them is all of the difference; it is given apart, since it is told from the noise in far fewer steps.
"""

import argparse
import statistics
import time

import torch

from ultrathink_model.config import Config, load_config, override_config
from ultrathink_model.config.profiles import profile_path
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.interface import Strategy
from ultrathink_model.distributed.strategy import make_strategy
from ultrathink_model.models.transformer import Transformer, build_model
from ultrathink_model.training.optimizer import make_optimizer


def main() -> None:
    """Prints the ratio of the steps' times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--override", nargs="*", default=[])
    options = parser.parse_args()
    text = load_config(profile_path(options.profile), ["training.use_amp=false", *options.override])
    media = override_config(text, ["advanced.enable_multimodal=true"])
    plain, seeing = prepared(text), prepared(media)
    ratios, seconds, behind = [], [], []
    for step in range(options.steps + 2):
        shape = text.training.batch_size, text.model.max_seq_length
        tokens = torch.randint(0, text.model.vocab_size, shape, generator=torch.Generator().manual_seed(step))
        # Who goes first changes, since the second finds warm caches.
        pair = [(plain, tokens), (seeing, tokens)]
        first, second = pair if step % 2 else pair[::-1]
        times = {id(strategy): step_seconds(strategy, step, batch) for strategy, batch in (first, second)}
        if step >= 2:
            (text_step, text_end), (media_step, media_end) = times[id(plain)], times[id(seeing)]
            ratios.append(media_step / text_step)
            seconds.append(text_step)
            behind.append(media_end - text_end)
    middle, spread = statistics.median(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    more = statistics.median(behind) / statistics.median(seconds)
    total = [sum(p.numel() for p in strategy.unwrapped.parameters()) for strategy in (plain, seeing)]
    print(
        f"{options.profile}: text step {statistics.median(seconds):.3f} s of processor time; with encoders × {middle:.4f} "
        f"(standard error of the mean {spread:.4f}, {len(ratios)} pairs), + {more:.2%} by what comes behind the backward pass; {total[0]:,} and {total[1]:,} parameters"
    )


def prepared(config: Config) -> Strategy:
    """One process's model and optimizer."""
    strategy = make_strategy(config, RankContext(0, 0, 1, torch.device("cpu")))
    strategy.prepare(build_model(config), lambda module: make_optimizer(config.training, module))
    strategy.model.train()
    return strategy


def step_seconds(strategy: Strategy, step: int, tokens: torch.Tensor) -> tuple[float, float]:
    """Processor time of one step, and of what of it comes behind the backward pass."""
    model = strategy.unwrapped
    assert isinstance(model, Transformer)
    began = time.process_time()
    model.begin_step(step)
    loss = strategy.model(tokens, labels=tokens).loss_sum / tokens.numel()
    strategy.backward(loss, is_last_micro_step=True)
    middle = time.process_time()
    model.complete_gradients(())
    strategy.gradient_norm_and_clip(1.0)
    strategy.step()
    ended = time.process_time()
    return ended - began, ended - middle


if __name__ == "__main__":
    main()
