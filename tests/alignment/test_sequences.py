import pytest
import torch
from alignment_cases import ROUTED, trained

from ultrathink_model.alignment.rollout import draw_responses
from ultrathink_model.alignment.sequences import make_sequences, response_states, token_logprobs
from ultrathink_model.config import override_config
from ultrathink_model.models.generation import generate
from ultrathink_model.models.hf import load_model


@pytest.mark.parametrize("folder", ["dense_folder", "routed_folder"])
def test_update_forward_gives_the_probabilities_that_the_rollout_drew_from(folder, request):
    model = load_model(request.getfixturevalue(folder)).eval()
    prompts = [[5, 6, 7, 8], [9, 10], [11]]
    sequences = make_sequences(prompts, [[1]] * 3, 0, "cpu")
    drawn = generate(
        model,
        sequences.tokens[:, :4],
        attention_mask=sequences.prompt_mask,
        max_new_tokens=6,
        temperature=0.7,
        generator=torch.Generator().manual_seed(0),
    )
    whole = make_sequences(prompts, drawn.tokens.tolist(), 0, "cpu")
    logits, _ = response_states(model, whole, 0.7)
    # Caches, masks and padding change the order of sums, not the function.
    torch.testing.assert_close(token_logprobs(logits, whole.responses), drawn.logprobs, atol=2e-5, rtol=0)


def test_routed_model_of_the_tests_really_routes(routed_folder):
    model = load_model(routed_folder)
    routers = [block.depth_router for block in model.blocks if block.depth_router is not None]
    assert routers
    assert all(router.thresholds.isfinite().any() for router in routers)


def test_padding_changes_no_logprob(dense_folder):
    model = load_model(dense_folder).eval()
    alone = make_sequences([[5, 6]], [[7, 8]], 0, "cpu")
    beside = make_sequences([[5, 6], [9, 10, 11, 12]], [[7, 8], [1, 2, 3, 4]], 0, "cpu")
    one = token_logprobs(response_states(model, alone, 1.0)[0], alone.responses)
    two = token_logprobs(response_states(model, beside, 1.0)[0], beside.responses)
    torch.testing.assert_close(one[0], two[0, :2], atol=2e-5, rtol=0)
    assert beside.response_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert alone.prompt_mask is None


def test_responses_end_at_the_end_of_text(base_config, manifest, dense_folder):
    model = load_model(dense_folder)
    with torch.no_grad():
        # A model that says end-of-text wherever it can.
        model.output_weight[manifest.eos_id] = model.output_weight.sum(0) * 0 + 5 * model.norm.weight.sign()
    rlhf = base_config.rlhf
    sequences = draw_responses(model, [[5, 6]] * 40, rlhf, manifest, torch.Generator().manual_seed(0), 16)
    assert sequences.tokens.shape == (40, 2 + rlhf.response_tokens)
    for tokens, mask in zip(sequences.responses, sequences.response_mask, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [place < length for place in range(rlhf.response_tokens)]
        assert manifest.eos_id not in tokens[: length - 1].tolist()
        if length < rlhf.response_tokens:
            assert tokens[length - 1] == manifest.eos_id


def test_experts_and_depths_are_in_the_routed_model(base_config, manifest):
    config = override_config(base_config, ROUTED)
    assert {"moe/load", "dre/paths"} <= trained(config, manifest, 1).routing_statistics().keys()
