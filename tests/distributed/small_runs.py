"""Short trainings that the ranks of the strategy tests run, on the real decoder and on data made from a seed."""

import torch

from ultrathink_model.distributed.context import all_reduce_sum, init_distributed, shutdown
from ultrathink_model.distributed.strategy import make_strategy
from ultrathink_model.models.transformer import build_model

GLOBAL_BATCH = 8
MICRO_STEPS = 2


def global_batch(config, step):
    """Tokens and labels of one step; rows lose different numbers of labels, so that ranks have unequal counts."""
    generator = torch.Generator().manual_seed(step)
    shape = (GLOBAL_BATCH, config.model.max_seq_length)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    labels = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    for row in range(GLOBAL_BATCH):
        labels[row, : 3 * row] = -100
    return tokens, labels


def make_optimizer(config):
    from ultrathink_model.training.optimizer import make_optimizer

    return lambda module: make_optimizer(config.training, module)


def prepared_strategy(config):
    context = init_distributed(config)
    strategy = make_strategy(config, context)
    strategy.prepare(build_model(config), make_optimizer(config))
    return strategy


def train_step(strategy, step):
    """One optimizer step as the trainer makes it; returns the mean loss and the gradient's norm."""
    config, context = strategy.config, strategy.context
    tokens, labels = (part.to(context.device) for part in global_batch(config, step))
    own = slice(context.rank * GLOBAL_BATCH // context.world_size, (context.rank + 1) * GLOBAL_BATCH // context.world_size)
    count = (labels != -100).sum()
    total = torch.zeros((), device=context.device)
    strategy.unwrapped.begin_step(step)
    strategy.model.train()
    for index, (x, y) in enumerate(zip(tokens[own].chunk(MICRO_STEPS), labels[own].chunk(MICRO_STEPS), strict=True)):
        output = strategy.model(x, labels=y)
        objective = (output.loss_sum + sum(output.aux_losses.values())) / count
        strategy.backward(objective * strategy.gradient_scale, index == MICRO_STEPS - 1)
        total += output.loss_sum.detach()
    norm = strategy.gradient_norm_and_clip(config.training.gradient_clipping)
    strategy.step()
    strategy.unwrapped.end_step(all_reduce_sum)
    return (all_reduce_sum(total) / count).item(), norm.item()


def curve(config, steps):
    strategy = prepared_strategy(config)
    losses, norms = zip(*(train_step(strategy, step) for step in range(steps)), strict=True)
    return {"losses": losses, "norms": norms, "weights": strategy.full_model_state()}


def curves(configs, steps):
    """The curve of each config, one after the other in the same ranks; what rank 0 saw."""
    return [curve(config, steps) for config in configs]
