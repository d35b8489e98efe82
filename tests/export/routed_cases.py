"""Models of every architecture, whose routers send tokens different ways."""

import torch

from ultrathink_model.config import make_config
from ultrathink_model.models.transformer import Transformer, build_model

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "max_seq_length": 64,
    "initializer_range": 0.2,
}
EXPERTS = [
    "advanced.enable_moe=true",
    *(f"moe.num_{group}_experts=2" for group in ("knowledge", "skill", "meta", "safety")),
]
DEPTHS = ["advanced.enable_dre=true", "dre.layer_frequency=1", "dre.dense_layers=1"]


def routed_model(*overrides: str) -> Transformer:
    """A model whose routers have learnt to tell tokens apart."""
    model = build_model(make_config({"model": SHAPE}, list(overrides))).eval()
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        if block.depth_router is not None:
            block.depth_router.router.weight.data.normal_(generator=generator)
            block.depth_router.strengths.data.fill_(0.5)
            block.depth_router.thresholds.copy_(torch.tensor([-0.5, 0.5, 2.0]))
        if getattr(block.feed_forward, "router_bias", None) is not None:
            block.feed_forward.router_bias.normal_(generator=generator)
    return model
