"""The load of the experts by what the tokens stand for."""

import pytest
import torch

from ultrathink_model.training.callbacks.routing import routing_metrics, routing_tables

SEQ = 40
MOE = "advanced.enable_moe=true"


def trained_step(model, tokens, media):
    model.train().begin_step(0)
    model(tokens, labels=tokens, media=media)
    model.end_step(lambda tensor: tensor)
    return model.routing_statistics()


@pytest.mark.parametrize("overrides", [[], ["advanced.enable_dre=true", "dre.layer_frequency=1"]], ids=["", "routed"])
def test_loads_of_the_modalities_make_up_the_load(media_model, some_media, random_tokens, overrides):
    model, tokens = media_model(MOE, *overrides), random_tokens(3, SEQ)
    statistics = trained_step(model, tokens, some_media(model.config, SEQ))
    counts = model._statistics
    for layer in range(2):
        by_modality = counts[f"{layer}/moe/modality_load"]
        torch.testing.assert_close(by_modality.sum(dim=0), counts[f"{layer}/moe/load"])
    if not overrides:
        # 2 images of 9 tokens and clips of 6 and 3, at two copies a token.
        assert by_modality.sum(dim=1).tolist() == [2 * (3 * SEQ - 27), 2 * 18, 2 * 9]
    assert statistics["moe/modality_load"].shape == (3, 2, 8)
    whole = statistics["moe/modality_load"].sum(dim=2)
    # A block that is routed in depth may be passed over by all the tokens of a modality.
    torch.testing.assert_close(whole[whole.isfinite()], torch.ones(int(whole.isfinite().sum())))
    assert whole.isfinite().all() or overrides


def test_experts_that_take_the_images_alone_are_seen(media_model, some_media, random_tokens):
    model = media_model(MOE, "moe.moe_top_k=1")
    media, tokens = some_media(model.config, SEQ), random_tokens(3, SEQ)
    mixture, grid = model.blocks[0].feed_forward, media.modalities().flatten()
    # A router that sends images to expert 5, sound to 1, and text to 0.
    chosen = torch.tensor([0, 5, 1])[grid]
    mixture._router_logits = lambda rows: 30 * torch.nn.functional.one_hot(chosen, 8).float()
    load = trained_step(model, tokens, media)["moe/modality_load"][:, 0]
    assert load.argmax(dim=1).tolist() == [0, 5, 1]
    assert load.max(dim=1).values.tolist() == [1, 1, 1]


def test_metrics_name_the_modalities_of_the_step(media_model, small_model, some_media, random_tokens):
    model, tokens = media_model(MOE), random_tokens(3, SEQ)
    media = some_media(model.config, SEQ)
    metrics = routing_metrics(trained_step(model, tokens, media))
    for name in ("text", "image", "audio"):
        assert 1 <= metrics[f"train/moe/{name}/max_load"] <= 8
        assert 0 < metrics[f"train/moe/{name}/entropy"] <= 1
    statistics = trained_step(model, tokens, None)
    metrics = routing_metrics(statistics)
    assert "train/moe/text/max_load" in metrics
    assert "train/moe/image/max_load" not in metrics
    assert routing_tables(statistics)["moe/modality_load"][1][0][0] is None
    assert "moe/modality_load" not in trained_step(small_model(MOE), tokens, None)
