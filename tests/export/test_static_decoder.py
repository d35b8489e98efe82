import pytest
import torch
from routed_cases import DEPTHS, EXPERTS, routed_model

from ultrathink_model.export.static_decoder import StaticDecoder


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_embeddings=false", "model.sliding_window=6"],
        EXPERTS,
        [*EXPERTS, "moe.layer_frequency=2", "moe.router_bias_rate=0.01"],
        DEPTHS,
        [*DEPTHS, "model.sliding_window=6"],
        [*DEPTHS, "dre.force_path=deep"],
        [*DEPTHS, "dre.force_path=fast"],
        [*DEPTHS, *EXPERTS, "advanced.enable_constitutional=true"],
    ],
    ids=" ".join,
)
@torch.no_grad()
def test_static_decoder_computes_what_the_model_does(overrides):
    model = routed_model(*overrides)
    tokens = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    found = StaticDecoder(model).eval()(tokens)
    # Sums in another order in float32; the logits go up to about 5.
    torch.testing.assert_close(found[0], expected.logits, atol=5e-5, rtol=1e-4)
    if model.harm_head is not None:
        torch.testing.assert_close(found[1], model.harm_head(expected.hidden).sigmoid(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_case_has_tokens_of_every_depth():
    passes = torch.stack(routed_model(*DEPTHS)(torch.randint(0, 96, (3, 40))).passes)
    assert set(passes.unique().tolist()) == {0, 1, 2, 3}
