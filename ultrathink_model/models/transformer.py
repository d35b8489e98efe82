"""The decoder: pre-norm blocks of attention and feed-forward, some with experts, some routed in depth."""

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ultrathink_model.config import Config
from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.media.placeholders import KINDS, Kind
from ultrathink_model.models.attention import Attention, FeedForward, LayerCache
from ultrathink_model.models.harm_head import HarmHead
from ultrathink_model.models.loss import ChunkLosses, chunked_cross_entropy
from ultrathink_model.models.moe import MixtureOfExperts
from ultrathink_model.models.multimodal.audio_encoder import AudioEncoder
from ultrathink_model.models.multimodal.image_encoder import ImageEncoder
from ultrathink_model.models.multimodal.media_encoder import MediaEncoder
from ultrathink_model.models.norm import RMSNorm
from ultrathink_model.models.reasoning import DepthRouter
from ultrathink_model.models.recomputation import run_block
from ultrathink_model.models.routing import Routing
from ultrathink_model.models.tokens import Rotation, Tokens


@dataclass
class ModelOutput:
    """What a forward pass gives; sums over tokens, so that micro-batches and ranks add up.

    Attributes:
        hidden: States after the final norm.
        logits: Next-token logits, when no labels are given.
        loss_sum: Cross-entropy in nats over the labels that are not -100.
        aux_losses: Weighted auxiliary losses by name; the objective is `loss_sum` plus all of them.
        passes: Passes that each token made of each block that is routed in depth, in the order of these blocks.
    """

    hidden: Float[Tensor, "batch seq hidden"]
    logits: Float[Tensor, "batch seq vocab"] | None = None
    loss_sum: Float[Tensor, ""] | None = None
    aux_losses: dict[str, Tensor] = field(default_factory=dict)
    passes: tuple[UInt8[Tensor, "batch seq"], ...] = ()


class Block(nn.Module):
    """One pre-norm block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        model = config.model
        self.attention_norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.feed_forward = MixtureOfExperts(config) if is_mixture(config, layer) else FeedForward(config)
        self.depth_router = DepthRouter(config) if is_routed(config, layer) else None

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], tokens: Tokens, rotation: Rotation, cache: LayerCache | None = None
    ) -> tuple[Float[Tensor, "batch seq hidden"], Routing]:
        """The block on every token, or as deep as the depth router sends each; `rotation` is the whole table."""
        if self.depth_router is None:
            change, routing = self.residual(x, tokens, rotation, cache)
            return x + change, routing
        return self.depth_router(self.residual, x, tokens, rotation, cache)

    def residual(
        self, x: Float[Tensor, "batch seq hidden"], tokens: Tokens, rotation: Rotation, cache: LayerCache | None = None
    ) -> tuple[Float[Tensor, "batch seq hidden"], Routing]:
        """What one pass of the block adds to the residual stream."""
        attended = self.attention(self.attention_norm(x), tokens, rotation.at(tokens.positions), cache)
        normed = self.feed_forward_norm(x + attended)
        if isinstance(self.feed_forward, MixtureOfExperts):
            update, routing = self.feed_forward(normed, tokens)
        else:
            update, routing = self.feed_forward(normed), Routing()
        return attended + update, routing


class Transformer(nn.Module):
    """The causal decoder. With every feature off it is Qwen3, with experts Qwen3-MoE.

    Routing state (expert loads, depth thresholds) changes only between steps, in `begin_step` and `end_step`; so a
    step's losses do not depend on how its batch is cut into micro-batches and ranks.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.head = None if model.tie_embeddings else nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        categories = config.advanced.harm_categories
        self.harm_head = HarmHead(model.hidden_size, len(categories)) if categories else None
        self.media_encoder = MediaEncoder(config) if config.advanced.enable_multimodal else None
        # `native.kernels.use_native_kernels` puts its own here.
        self.native: ChunkLosses | None = None
        self._rotation: Rotation | None = None
        self._counts: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}

    @property
    def output_weight(self) -> Float[Tensor, "vocab hidden"]:
        """The output projection: the embedding itself where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        source_groups: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Bool[Tensor, "batch seq"] | None = None,
        cache: Sequence[LayerCache] | None = None,
        start: int = 0,
        return_logits: bool = True,
        logits_from: int = 0,
        harm_labels: Int[Tensor, "labelled seq"] | None = None,
        media: MediaBatch | None = None,
    ) -> ModelOutput:
        """One pass over a batch.

        Args:
            input_ids: Tokens.
            labels: Target of each position, already shifted; -100 is left out of the loss.
            document_ids: Tokens see only their own document; None makes each row one document.
            source_groups: Expert group of the token's source, -1 for none.
            attention_mask: False at padding.
            cache: The layers' keys and values, to which this call's are added.
            start: Position of the first column, where earlier ones are in the cache.
            return_logits: Whether logits are wanted when there are no labels.
            logits_from: First column whose logits are wanted.
            harm_labels: Harm of each token of the last rows, for training the harm head; see `HarmHead.loss_sum`.
            media: Images and sounds, whose states take the places of the tokens that it names; None leaves all tokens
                as they are, and the encoders idle.
        """
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        modalities = None if media is None else media.modalities()
        window = self.config.model.sliding_window
        tokens = Tokens(positions, document_ids, attention_mask, source_groups, window, modalities)
        if cache is None:
            tokens = tokens.with_mask()
        rotation = self._rotation_table(start + input_ids.shape[1], input_ids.device)
        x = self.embedding(input_ids)
        if self.media_encoder is not None:
            x = self.media_encoder(x, media)
        else:
            assert media is None, "the model was built without encoders"
        report = Routing()
        for layer, block in enumerate(self.blocks):
            x, routing = self._run_block(block, x, tokens, rotation, None if cache is None else cache[layer])
            counts = {f"{layer}/{name}": count for name, count in routing.counts.items()}
            report = report.merge(Routing(routing.losses, counts, routing.passes))
        hidden = self.norm(x)
        if self.training:
            self._counts = Routing(counts=self._counts).merge(Routing(counts=report.counts)).counts
        if labels is None:
            logits = F.linear(hidden[:, logits_from:], self.output_weight) if return_logits else None
            return ModelOutput(hidden, logits, aux_losses=report.losses, passes=report.passes)
        training = self.config.training
        loss_sum, z_loss = chunked_cross_entropy(
            hidden,
            self.output_weight,
            labels,
            training.loss_chunk_size,
            training.z_loss_weight if self.training else 0.0,
            self.native,
        )
        if self.training and training.z_loss_weight:
            report.losses["z_loss"] = z_loss
        if self.training and self.harm_head is not None:
            report.losses["harm"] = self.config.constitutional.harm_loss_weight * self.harm_head.loss_sum(
                hidden, harm_labels
            )
        return ModelOutput(hidden, loss_sum=loss_sum, aux_losses=report.losses, passes=report.passes)

    def _run_block(
        self, block: nn.Module, x: Tensor, tokens: Tokens, rotation: Rotation, cache: LayerCache | None
    ) -> tuple[Tensor, Routing]:
        if self.config.model.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return run_block(self.config, block, x, tokens, rotation, cache)
        return block(x, tokens, rotation, cache)

    def _rotation_table(self, length: int, device: torch.device) -> Rotation:
        model = self.config.model
        table = self._rotation
        if torch.compiler.is_compiling():
            # A table that is kept would have the model compiled once more after its first call.
            return Rotation.table(length, model.head_size, model.rope_theta, device)
        if table is None or table.cos.shape[0] < length or table.cos.device != device:
            table = Rotation.table(max(length, model.max_seq_length), model.head_size, model.rope_theta, device)
            self._rotation = table
        return table

    def begin_step(self, step: int) -> None:
        """Tells the depth routers the optimizer step that begins (0-based), which sets their compute."""
        for block in self.blocks:
            if isinstance(block.depth_router, DepthRouter):
                block.depth_router.begin_step(step)

    @torch.no_grad()
    def complete_gradients(self, media_seen: Collection[Kind]) -> None:
        """Settles the gradients of the encoders, alike under every strategy.

        Without a medium on this rank, but with one on another, an encoder has a gradient of zero. Where no rank had any,
        Muon leaves it as it is, since it would make a full step of what is left of its momentum.

        Args:
            media_seen: The kinds of media that the step had, on any rank.
        """
        if self.media_encoder is None:
            return
        for kind in KINDS:
            rests = kind not in media_seen and self.config.training.optimizer == "muon"
            for parameter in self.media_encoder.parameters_of(kind):
                if rests:
                    parameter.grad = None
                elif parameter.requires_grad and parameter.grad is None and not self.media_encoder.runs_always:
                    parameter.grad = torch.zeros_like(parameter)

    def end_step(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Hands each routed layer its counts over the whole step, and keeps them as the step's statistics.

        Args:
            all_reduce: Sums a tensor over all ranks; the identity on one.
        """
        if not self._counts:
            return
        names = sorted(self._counts)
        flat = all_reduce(torch.cat([self._counts[name].flatten().float() for name in names]))
        sums = flat.split([self._counts[name].numel() for name in names])
        counts = {name: total.view(self._counts[name].shape) for name, total in zip(names, sums, strict=True)}
        self._counts = {}
        self._statistics = counts
        for layer, block in enumerate(self.blocks):
            own = {name.partition("/")[2]: n for name, n in counts.items() if name.startswith(f"{layer}/")}
            for module in (block.feed_forward, block.depth_router):
                if isinstance(module, MixtureOfExperts | DepthRouter):
                    module.end_step(own)

    def routing_statistics(self) -> dict[str, Tensor]:
        """Loads, entropy and paths of the last finished step, on the CPU; empty for a dense model."""
        by_layer: dict[int, dict[str, Tensor]] = {}
        for name, total in self._statistics.items():
            layer, _, count = name.partition("/")
            by_layer.setdefault(int(layer), {})[count] = total.cpu()
        layers = [by_layer[layer] for layer in sorted(by_layer)]
        return {**MixtureOfExperts.statistics(layers), **DepthRouter.statistics(layers)}


def is_mixture(config: Config, layer: int) -> bool:
    """Whether block `layer` (0-based) holds a mixture of experts."""
    return config.advanced.enable_moe and (layer + 1) % config.moe.layer_frequency == 0


def is_routed(config: Config, layer: int) -> bool:
    """Whether block `layer` (0-based) is routed in depth."""
    dre = config.dre
    return config.advanced.enable_dre and layer >= dre.dense_layers and (layer + 1) % dre.layer_frequency == 0


def build_model(config: Config, device: torch.device | str = "cpu") -> Transformer:
    """A freshly initialised model on `device`, in float32, the same for the same `training.seed`."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    initialise(model, config.training.seed)
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Draws every weight: normal, with what writes to the residual stream scaled by `1 / sqrt(2 · layers)`.

    Norms start at one, experts and depth routers as their own modules say. A module's draws follow from the seed and
    its name alone, so that the weights two models share are the same in both, whatever features are on.
    """
    model_config = model.config.model
    spread = model_config.initializer_range
    residual_spread = spread / (2 * model_config.num_layers) ** 0.5
    # Parents come last: what they say of their parts holds.
    for name, module in reversed(list(model.named_modules())):
        generator = torch.Generator(device=model.embedding.weight.device)
        generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        if isinstance(module, nn.RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, ImageEncoder | AudioEncoder):
            module.initialise(generator)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, spread, generator=generator)
        elif isinstance(module, nn.Linear):
            writes_residual = name.endswith(("attention.output", "feed_forward.down"))
            module.weight.normal_(0.0, residual_spread if writes_residual else spread, generator=generator)
        elif isinstance(module, HarmHead):
            module.initialise(generator, spread)
        elif isinstance(module, MixtureOfExperts | DepthRouter):
            module.initialise(generator, spread, residual_spread)
