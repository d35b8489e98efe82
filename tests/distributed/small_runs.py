"""Short trainings that the ranks of the strategy tests run, on the real decoder and on data made from a seed."""

import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from ultrathink_model.distributed.context import init_distributed
from ultrathink_model.distributed.strategy import make_strategy
from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.media.counts import frame_tokens, image_tokens
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


def media_of(config, step, rows):
    """The media of some rows of a step: row 0 has an image, row 5 a clip, and every third step no row has any."""
    if not config.advanced.enable_multimodal or step % 3 == 1:
        return None
    generator, options = torch.Generator().manual_seed(step), config.multimodal
    image = torch.randn(1, 3, options.image_size, options.image_size, generator=generator)
    clip = torch.randn(1, options.mel_bins, 20, generator=generator)
    slots = torch.full((len(rows), config.model.max_seq_length), -1)
    media = MediaBatch()
    if 0 in rows:
        media.images, media.image_slots = image, slots.clone()
        media.image_slots[rows.index(0), 3 : 3 + image_tokens(options)] = torch.arange(image_tokens(options))
    if 5 in rows:
        media.audio, media.audio_frames, media.audio_slots = clip, torch.tensor([20]), slots.clone()
        media.audio_slots[rows.index(5), 1 : 1 + frame_tokens(options, 20)] = torch.arange(frame_tokens(options, 20))
    return media if 0 in rows or 5 in rows else None


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
    own = slice(
        context.data_rank * GLOBAL_BATCH // context.data_ranks,
        (context.data_rank + 1) * GLOBAL_BATCH // context.data_ranks,
    )
    count = (labels != -100).sum()
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    strategy.unwrapped.begin_step(step)
    strategy.model.train()
    numbers = torch.arange(GLOBAL_BATCH)[own].chunk(MICRO_STEPS)
    for index, (x, y) in enumerate(zip(tokens[own].chunk(MICRO_STEPS), labels[own].chunk(MICRO_STEPS), strict=True)):
        # In every second step no rank has a text that is labelled for harm.
        harm = x % 1024 if strategy.unwrapped.harm_head is not None and step % 2 == 0 else None
        media = media_of(config, step, numbers[index].tolist())
        output = strategy.model(x, labels=y, harm_labels=harm, media=media)
        objective = (output.loss_sum + sum(output.aux_losses.values())) / count
        strategy.backward(objective * strategy.gradient_scale, index == MICRO_STEPS - 1)
        total += output.loss_sum.detach()
    kinds = [kind for row, kind in ((0, "image"), (5, "audio")) if media_of(config, step, [row]) is not None]
    strategy.unwrapped.complete_gradients(kinds)
    norm = strategy.gradient_norm_and_clip(config.training.gradient_clipping)
    strategy.step()
    strategy.unwrapped.end_step(strategy.context.sum_over_data)
    return (context.sum_over_data(total) / count).item(), norm.item()


def train_steps(strategy, steps):
    losses, norms = zip(*(train_step(strategy, step) for step in steps), strict=True)
    return {"losses": losses, "norms": norms}


def curve(config, steps):
    strategy = prepared_strategy(config)
    return {**train_steps(strategy, range(steps)), "weights": strategy.full_model_state()}


def curves(configs, steps):
    """The curve of each config by its name, in one start of the ranks."""
    return {name: curve(config, steps) for name, config in configs.items()}


def curve_after_skipped_step(config):
    """Two steps after one whose gradient is not finite on the last rank alone."""
    strategy = prepared_strategy(config)
    tokens, labels = (part.to(strategy.context.device) for part in global_batch(config, 9))
    spoilt = torch.nan if strategy.context.rank == strategy.context.world_size - 1 else 1.0
    output = strategy.model(tokens[:2], labels=labels[:2])
    loss = output.loss_sum + sum(output.aux_losses.values())
    strategy.backward(loss * spoilt, is_last_micro_step=True)
    norm = strategy.gradient_norm_and_clip(1.0)
    assert not torch.isfinite(norm), f"rank {strategy.context.rank} did not hear of it: {norm}"
    strategy.skip_step()
    # The model's routing does not follow a skipped step either, as the trainer sees to.
    buffers = [buffer.clone() for buffer in strategy.unwrapped.buffers()]
    strategy.unwrapped.end_step(strategy.context.sum_over_data)
    for buffer, before in zip(strategy.unwrapped.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return train_steps(strategy, range(2))


def saved_and_continued(config, folder):
    """Trains three steps, saves, and trains two more."""
    strategy = prepared_strategy(config)
    train_steps(strategy, range(3))
    save_with_dcp(strategy.state_dict(), folder)
    return train_steps(strategy, range(3, 5))


def loaded_and_continued(config, folder):
    """The two steps after a saved state."""
    strategy = prepared_strategy(config)
    state = strategy.state_dict()
    load_with_dcp(state, folder)
    strategy.load_state_dict(state)
    return train_steps(strategy, range(3, 5))


def save_with_dcp(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_with_dcp(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def held_elements(config):
    """Numbers in the storages of this rank's weights and of its optimizer's state, after a step."""
    strategy = prepared_strategy(config)
    train_step(strategy, 0)
    state = [t for part in strategy.optimizer.state.values() for key, t in part.items() if key != "step"]
    return {"weights": _elements(strategy.unwrapped.parameters()), "optimizer": _elements(state)}


def _elements(tensors):
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(sizes.values()) // 4


def run_all(configs, loaded, steps, folder):
    """Everything that the tests ask of each strategy, in one start of the ranks.

    Args:
        configs: By name.
        loaded: Pairs of the config that loads and the one that saved.
        steps: Length of the curves.
        folder: Where states are saved.
    """
    return {
        "curves": {name: curve(config, steps) for name, config in configs.items()},
        "skipped": {name: curve_after_skipped_step(config) for name, config in configs.items()},
        "saved": {name: saved_and_continued(config, folder / name) for name, config in configs.items()},
        "loaded": {(by, of): loaded_and_continued(configs[by], folder / of) for by, of in loaded},
    }
