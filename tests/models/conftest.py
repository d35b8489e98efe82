"""What the tests of the model share: small models of any variant, and random tokens."""

from collections.abc import Callable

import jaxtyping
import pytest
import torch
from torch import Tensor

from ultrathink_model.config import Config, make_config
from ultrathink_model.models.transformer import Transformer, build_model

SMALL_VALUES = {
    "model": {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 48,
        "max_seq_length": 64,
    },
    "moe": {
        "num_knowledge_experts": 3,
        "num_skill_experts": 2,
        "num_meta_experts": 2,
        "num_safety_experts": 1,
    },
}

SmallConfig = Callable[..., Config]
SmallModel = Callable[..., Transformer]


@pytest.fixture(autouse=True)
def _checked_shapes(request, monkeypatch) -> None:
    """Checks shapes, but where our modules are taken without our types."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", "shapes_unchecked" in request.keywords)


@pytest.fixture
def small_config() -> SmallConfig:
    """`small_config("moe.moe_top_k=1", …)`: a config of a few thousand weights."""
    return lambda *overrides: make_config(SMALL_VALUES, list(overrides))


@pytest.fixture
def small_model(small_config) -> SmallModel:
    """`small_model("advanced.enable_moe=true", …)`: the model, its weights drawn wide enough to tell it from zero."""

    def build(*overrides: str) -> Transformer:
        return build_model(small_config("model.initializer_range=0.2", *overrides))

    return build


@pytest.fixture
def random_tokens() -> Callable[..., Tensor]:
    """`random_tokens(batch, seq, seed=0)`: tokens of the small vocabulary."""

    def draw(batch: int, seq: int, seed: int = 0) -> Tensor:
        return torch.randint(0, 96, (batch, seq), generator=torch.Generator().manual_seed(seed))

    return draw
