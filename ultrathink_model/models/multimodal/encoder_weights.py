"""Encoders taken from local Hugging Face folders: CLIP's or SigLIP's for images, Whisper's for sound."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.multimodal.audio_encoder import sinusoids
from ultrathink_model.models.multimodal.image_encoder import resized_positions
from ultrathink_model.models.multimodal.media_encoder import MediaEncoder
from ultrathink_model.models.weight_files import WeightFiles

Take = Callable[[str], Tensor]

# Theirs are stored in half precision at times; another kind of positions is off by its own size, about one.
SAME_POSITIONS = 1e-2


@torch.no_grad()
def take_encoders(encoder: MediaEncoder, config: Config) -> dict[str, int]:
    """Gives the encoders the weights of `multimodal.image_encoder` and `multimodal.audio_encoder`, as far as set.

    An image encoder's positions are brought to the size of this run's images.

    Returns:
        Number of tensors taken, by key of the config.

    Raises:
        CheckpointError: A folder is missing, or lacks a weight or has one of another shape.
    """
    media, taken = config.multimodal, {}
    for key, folder, target, weights in (
        ("multimodal.image_encoder", media.image_encoder, encoder.image_encoder, _image_weights),
        ("multimodal.audio_encoder", media.audio_encoder, encoder.audio_encoder, _audio_weights),
    ):
        if folder is None:
            continue
        if not Path(folder).is_dir():
            raise CheckpointError(f"{key}={folder} does not exist; name a local Hugging Face folder")
        state = target.state_dict()
        for name, weight in weights(WeightFiles(Path(folder)), config):
            if weight.shape != state[name].shape:
                raise CheckpointError(
                    f"{key}={folder}: {name} is {tuple(weight.shape)} there, where this run's is "
                    f"{tuple(state[name].shape)}; its files do not belong together, copy the folder again"
                )
            state.pop(name).copy_(weight)
        assert not state, f"{key}: {', '.join(state)} would stay as drawn"
        taken[key] = len(target.state_dict())
    return taken


def _image_weights(files: WeightFiles, config: Config) -> Iterator[tuple[str, Tensor]]:
    media = config.multimodal
    take = _below(files, "embeddings.patch_embedding.weight")
    yield "patches.weight", take("embeddings.patch_embedding.weight").flatten(1)
    positions = take("embeddings.position_embedding.weight")
    yield "positions", resized_positions(positions, media.image_grid)
    if media.image_architecture == "clip":
        yield "class_token", take("embeddings.class_embedding")
        # The published spelling.
        yield from _pair(take, "first_norm", "pre_layrnorm")
    else:
        yield "patches.bias", take("embeddings.patch_embedding.bias")
        yield from _pair(take, "last_norm", "post_layernorm")
    for layer in range(media.image_layers):
        yield from _block(take, layer, f"encoder.layers.{layer}", ("layer_norm1", "layer_norm2"), "mlp.")


def _audio_weights(files: WeightFiles, config: Config) -> Iterator[tuple[str, Tensor]]:
    take = _below(files, "conv1.weight")
    _require_sinusoids(take("embed_positions.weight"))
    yield from _pair(take, "first_convolution", "conv1")
    yield from _pair(take, "second_convolution", "conv2")
    yield from _pair(take, "last_norm", "layer_norm")
    for layer in range(config.multimodal.audio_layers):
        yield from _block(take, layer, f"layers.{layer}", ("self_attn_layer_norm", "final_layer_norm"), "")


def _block(take: Take, layer: int, theirs: str, norms: tuple[str, str], inner: str) -> Iterator[tuple[str, Tensor]]:
    ours, attention = f"blocks.{layer}", f"{theirs}.self_attn"
    yield from _pair(take, f"{ours}.attention_norm", f"{theirs}.{norms[0]}")
    yield from _pair(take, f"{ours}.feed_forward_norm", f"{theirs}.{norms[1]}")
    yield f"{ours}.attention.qkv.weight", torch.cat([take(f"{attention}.{part}_proj.weight") for part in "qkv"])
    yield f"{ours}.attention.qkv.query_bias", take(f"{attention}.q_proj.bias")
    yield f"{ours}.attention.qkv.value_bias", take(f"{attention}.v_proj.bias")
    yield from _pair(take, f"{ours}.attention.output", f"{attention}.out_proj")
    yield from _pair(take, f"{ours}.feed_forward.up", f"{theirs}.{inner}fc1")
    yield from _pair(take, f"{ours}.feed_forward.down", f"{theirs}.{inner}fc2")


def _pair(take: Take, ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", take(f"{theirs}.{part}")


def _below(files: WeightFiles, landmark: str) -> Take:
    """Reads the weights beside `landmark`, however deep in a larger model they lie."""
    prefix = next((name.removesuffix(landmark) for name in files if name.endswith(landmark)), "")
    return lambda name: files[f"{prefix}{name}"]


def _require_sinusoids(positions: Tensor) -> None:
    expected = sinusoids(positions.shape[0], positions.shape[1], positions.device)
    if (positions - expected).abs().max() > SAME_POSITIONS:
        raise CheckpointError(
            "multimodal.audio_encoder: its positions are not Whisper's sinusoids, which are not stored here; "
            "take another folder"
        )
