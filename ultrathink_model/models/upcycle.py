"""Starting a model from a trained one, with features switched on that the trained one does not have."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.media.placeholders import MEDIA_TOKENS
from ultrathink_model.models.hf import copy_weight, read_model_config, read_weights
from ultrathink_model.models.hf_config import expert_width
from ultrathink_model.models.model_folder import existing_folder
from ultrathink_model.models.multimodal.image_encoder import resized_positions
from ultrathink_model.models.tokenizer_files import TOKENIZER_FILE, vocabulary
from ultrathink_model.models.transformer import Transformer, is_mixture, is_routed

# Key of the section `model` to the property that resolves it: what the function of the model depends on.
MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "num_kv_heads": "kv_heads",
    "head_dim": "head_size",
    "intermediate_size": "feed_forward_size",
    "rope_theta": "rope_theta",
    "norm_eps": "norm_eps",
    "tie_embeddings": "tie_embeddings",
    "sliding_window": "sliding_window",
}
# The same of the section `multimodal`, `image_size` aside: positions are brought to another one.
MEDIA_KEYS = {
    "patch_size": "patch_size",
    "audio_sample_rate": "audio_sample_rate",
    "mel_bins": "mel_bins",
    "audio_stack": "audio_stack",
    "image_architecture": "image_architecture",
    "image_hidden_size": "image_hidden_size",
    "image_layers": "image_layers",
    "image_heads": "image_heads",
    "image_intermediate_size": "image_inner_size",
    "image_activation": "image_activation",
    "image_mean": "image_mean",
    "image_std": "image_std",
    "audio_hidden_size": "audio_hidden_size",
    "audio_layers": "audio_layers",
    "audio_heads": "audio_heads",
    "audio_intermediate_size": "audio_inner_size",
}
POSITIONS = "media_encoder.image_encoder.positions"
# Weights with a row for each token of the vocabulary.
ROWS_OF_TOKENS = ("embedding.weight", "head.weight")


@dataclass
class InitReport:
    """Where the weights and buffers of a model come from, by their names.

    Attributes:
        taken: From the source, as they were.
        split: Experts and their routers, made from the source's feed-forwards.
        new: Not in the source: as they were in the model.
        new_rows: Rows of the embedding that the source has not, as they were in the model.
    """

    taken: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    new_rows: int = 0

    def summary(self) -> str:
        """One line for the log: how many tensors are of each kind, and which parts of the blocks are not just taken."""
        rows = f", and {self.new_rows} new rows of the embedding" if self.new_rows else ""
        return (
            f"{len(self.taken)} tensors taken as they were, {len(self.split)} made by splitting{_parts(self.split)}, "
            f"{len(self.new)} new{_parts(self.new)}{rows}"
        )


def _parts(names: list[str]) -> str:
    """The names in brackets, each once for all blocks that have it, and an encoder or a projection as one."""
    parts = dict.fromkeys(_part(name) for name in names)
    return f" ({', '.join(parts)})" if parts else ""


def _part(name: str) -> str:
    if name.startswith("media_encoder."):
        return name.split(".")[1]
    return re.sub(r"^blocks\.\d+\.", "", name)


@torch.no_grad()
def initialise_from(model: Transformer, folder: Path, tokenizer_folder: Path | None = None) -> InitReport:
    """Gives a freshly built model the weights of `folder`, so that it computes the same function.

    What the source does not have is left as `build_model` made it, which is neutral for depth routers. Dense
    feed-forwards become experts; see `split_into_experts`. The first step's loss is the source's up to rounding,
    unless `moe.upcycle_noise`, `moe.expert_capacity` or a depth budget without warm-up says otherwise. Where images
    and sound are new, `model.vocab_size` may be larger than the source's, to make room for their tokens: what the
    softmax gives to the new rows is then missing elsewhere.

    Args:
        model: A model from `build_model`.
        folder: The trained model: a `final_model/`, or a Qwen3 or Qwen3-MoE folder.
        tokenizer_folder: The tokenizer of this run, which must have the source's vocabulary, but for the tokens of
            media where these are new; None compares nothing.

    Raises:
        CheckpointError: The folder holds no model, or its model cannot become this one.
    """
    folder, target = Path(folder), model.config
    source = read_model_config(folder)
    _refuse_what_differs(source, target, folder)
    if tokenizer_folder is not None:
        _refuse_other_vocabulary(folder, Path(tokenizer_folder), MEDIA_TOKENS if _gains_media(source, target) else ())
    report = InitReport(new_rows=target.model.vocab_size - source.model.vocab_size)
    state = model.state_dict()
    generator = torch.Generator().manual_seed(target.training.seed)
    becoming: dict[str, dict[str, Tensor]] = {
        f"blocks.{layer}.feed_forward": {}
        for layer in range(target.model.num_layers)
        if is_mixture(target, layer) and not is_mixture(source, layer)
    }
    for name, weight in read_weights(folder, source):
        block, _, part = name.removesuffix(".weight").rpartition(".")
        if block not in becoming:
            resized = resized_positions(weight, target.multimodal.image_grid) if name == POSITIONS else weight
            place = state[name][: source.model.vocab_size] if name in ROWS_OF_TOKENS else state[name]
            copy_weight({name: place}, name, resized, folder)
            report.taken.append(name)
            continue
        becoming[block][part] = weight
        if len(becoming[block]) == len(("gate_up", "down")):
            report.split += _become_mixture(state, block, becoming.pop(block), target, generator)
    report.new = [name for name in state if name not in {*report.taken, *report.split}]
    return report


def split_into_experts(
    gate_up: Float[Tensor, "double_width hidden"],
    down: Float[Tensor, "hidden width"],
    num_experts: int,
    num_shards: int,
) -> tuple[Float[Tensor, "experts double_part hidden"], Float[Tensor, "experts hidden part"]]:
    """Experts that together are the dense feed-forward.

    The neurons are cut into m shards, and expert i holds shard i mod m with its output times m. Experts i·m to
    i·m + m - 1 are thus a whole copy of the feed-forward. With one router row for each copy they have the same
    logit, so the k best, m dividing k, are whole copies; their weights sum to 1, so the sum is the dense output.

    Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055) with the virtual groups of He et al. 2024
    (arXiv 2410.07524).

    Args:
        gate_up: Rows of the gate, then of the up projection.
        down: The down projection.
        num_experts: A multiple of `num_shards`.
        num_shards: m, a divisor of the width; 1 copies the feed-forward whole.
    """
    gate, up = (part.unflatten(0, (num_shards, -1)) for part in gate_up.chunk(2))  # (shards, part, hidden)
    shards = torch.cat((gate, up), dim=1)
    down_shards = down.unflatten(1, (num_shards, -1)).transpose(0, 1) * num_shards  # (shards, hidden, part)
    copies = num_experts // num_shards
    return shards.repeat(copies, 1, 1), down_shards.repeat(copies, 1, 1)


def _become_mixture(
    state: dict[str, Tensor], block: str, dense: dict[str, Tensor], target: Config, generator: torch.Generator
) -> list[str]:
    """Fills the mixture at `block` from the dense weights; returns the names of what it filled."""
    num_shards = target.model.feed_forward_size // expert_width(target)
    experts = split_into_experts(dense["gate_up"], dense["down"], target.moe.num_experts, num_shards)
    names = [f"{block}.gate_up", f"{block}.down"]
    for name, weight in zip(names, experts, strict=True):
        if target.moe.upcycle_noise:
            spread = target.moe.upcycle_noise * weight.std()
            weight.add_(spread * torch.randn(weight.shape, generator=generator))
        state[name].copy_(weight)
    router = state[f"{block}.router.weight"]
    router.copy_(router[::num_shards].repeat_interleave(num_shards, dim=0))
    return [*names, f"{block}.router.weight"]


def _gains_media(source: Config, target: Config) -> bool:
    return target.advanced.enable_multimodal and not source.advanced.enable_multimodal


def _differences(section: str, keys: dict[str, str], source: Config, target: Config) -> list[str]:
    here, there = getattr(target, section), getattr(source, section)
    return [
        f"{section}.{key}={getattr(here, resolved)}, {getattr(there, resolved)} there"
        for key, resolved in keys.items()
        if getattr(here, resolved) != getattr(there, resolved)
    ]


def _refuse_what_differs(source: Config, target: Config, folder: Path) -> None:
    grows = _gains_media(source, target) and target.model.vocab_size > source.model.vocab_size
    keys = {key: resolved for key, resolved in MODEL_KEYS.items() if not (grows and key == "vocab_size")}
    differences = _differences("model", keys, source, target)
    if source.advanced.enable_moe:
        differences += _mixture_differences(source, target)
    elif target.advanced.enable_moe:
        _refuse_uneven_split(target, folder)
    if source.advanced.enable_dre and not _same_blocks(is_routed, source, target):
        differences.append(
            f"advanced.enable_dre={target.advanced.enable_dre} with dre.layer_frequency={target.dre.layer_frequency} and "
            f"dre.dense_layers={target.dre.dense_layers}, {source.advanced.enable_dre} with {source.dre.layer_frequency} "
            f"and {source.dre.dense_layers} there"
        )
    if source.advanced.enable_constitutional and not target.advanced.enable_constitutional:
        differences.append("advanced.enable_constitutional=False, and a harm head there, which would be lost")
    if source.advanced.enable_multimodal and not target.advanced.enable_multimodal:
        differences.append("advanced.enable_multimodal=False, and encoders there, which would be lost")
    elif source.advanced.enable_multimodal:
        differences += _differences("multimodal", MEDIA_KEYS, source, target)
    if differences:
        raise CheckpointError(
            f"--init-from {folder} does not fit this run: {'; '.join(differences)}. Give the run the source's values."
        )


def _mixture_differences(source: Config, target: Config) -> list[str]:
    if not target.advanced.enable_moe:
        return ["advanced.enable_moe=False, and a mixture there, which no dense feed-forward can stand in for"]
    if source.moe.router_bias_rate and not target.moe.router_bias_rate:
        return [
            f"moe.router_bias_rate=0.0, {source.moe.router_bias_rate} there, whose experts are chosen by a bias too"
        ]
    keys = {
        "moe.layer_frequency": lambda config: config.moe.layer_frequency,
        "experts of all groups": lambda config: config.moe.num_experts,
        "moe.moe_top_k": lambda config: config.moe.moe_top_k,
        "moe.expert_hidden_size": expert_width,
    }
    return [
        f"{key}={value(target)}, {value(source)} there" for key, value in keys.items() if value(target) != value(source)
    ]


def _same_blocks(kind: Callable[[Config, int], bool], source: Config, target: Config) -> bool:
    return all(kind(source, layer) == kind(target, layer) for layer in range(source.model.num_layers))


def _refuse_uneven_split(target: Config, folder: Path) -> None:
    width, part, moe = target.model.feed_forward_size, expert_width(target), target.moe
    start = f"--init-from {folder}: a dense feed-forward of {width} units"
    shards = width // part
    if width % part:
        raise CheckpointError(
            f"{start} does not split into experts of {part}: {width} / {part} = {width / part:g}; "
            f"set moe.expert_hidden_size to {width}, or to {width} divided by a divisor of moe.moe_top_k={moe.moe_top_k}."
        )
    if moe.moe_top_k % shards:
        raise CheckpointError(
            f"{start} splits into {width} / {part} = {shards} experts, which moe.moe_top_k={moe.moe_top_k} does not "
            f"choose whole; set moe.moe_top_k to a multiple of {shards}, or moe.expert_hidden_size to {width}."
        )
    if moe.num_experts % shards:
        raise CheckpointError(
            f"{start} splits into {width} / {part} = {shards} experts, of which {moe.num_experts} are "
            f"{moe.num_experts / shards:g} copies; change moe.num_knowledge_experts so that all groups together hold "
            f"a multiple of {shards}."
        )


def _refuse_other_vocabulary(folder: Path, tokenizer_folder: Path, new_tokens: Collection[str]) -> None:
    source_folder = existing_folder(folder)
    if not (source_folder / TOKENIZER_FILE).is_file():
        return
    there, here = vocabulary(source_folder), vocabulary(tokenizer_folder)
    if there != here and there != {token: number for token, number in here.items() if token not in new_tokens}:
        common = sum(here.get(token) == number for token, number in there.items())
        raise CheckpointError(
            f"--init-from {folder} was trained with another tokenizer: of its {len(there)} tokens {common} have the "
            f"same id among the {len(here)} of {tokenizer_folder}. Set data.tokenizer_name={folder}."
        )
