import copy
import math

import pytest
import torch
from alignment_cases import ALONE
from test_reward import pairs_by_token

from ultrathink_model.alignment.dpo import DPO, response_logprobs
from ultrathink_model.alignment.draws import make_generator
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.rollout import draw_responses, examine
from ultrathink_model.alignment.sequences import make_sequences
from ultrathink_model.alignment.update import KLLimit, update_policy
from ultrathink_model.config import override_config
from ultrathink_model.models.hf import load_model

NO_LIMIT = KLLimit(0.0, math.inf)


class NoScore:
    def score(self, sequences):
        return torch.zeros(len(sequences))


def margin(model, pairs) -> float:
    """Mean log-probability of the chosen sides less that of the rejected ones, in nats."""
    prompts = [pair.prompt for pair in pairs]
    with torch.no_grad():
        chosen, rejected = (
            response_logprobs(model, make_sequences(prompts, [getattr(pair, side) for pair in pairs], 0, "cpu"), 1.0)
            for side in ("chosen", "rejected")
        )
    return float((chosen - rejected).mean())


@pytest.mark.parametrize("folder", ["dense_folder", "routed_folder"])
def test_the_chosen_side_gains_on_the_rejected_one_on_prompts_never_seen(config, manifest, folder, request):
    config = override_config(config, ["rlhf.algorithm=dpo"])
    policy = load_model(request.getfixturevalue(folder)).eval()
    reference = copy.deepcopy(policy)
    pairs, held_out = pairs_by_token(48, 0), pairs_by_token(8, 100)
    dpo = DPO(config, pairs, reference, 0, ALONE)
    learner = Learner(config, ALONE, policy, None, 5e-3, 5e-3)
    before, losses = margin(policy, held_out), []
    for number in range(6):
        drawn = draw_responses(policy, [[5, 6]] * 16, config.rlhf, manifest, make_generator(number), 16)
        rollout = examine(drawn, learner, reference, NoScore(), config.rlhf, 16)
        rows = dpo.prepare(rollout, 0.0, 16 * number)
        update = update_policy(learner, dpo, rows, config, number, NO_LIMIT)
        losses.append(update.means["policy_loss"])
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert losses[-1] < losses[0] - 0.1
    assert update.means["margin"] > 0
    assert margin(policy, held_out) > before + 1


def test_rounds_go_through_all_training_pairs_before_any_comes_again(config, manifest, dense_folder):
    model = load_model(dense_folder).eval()
    pairs = pairs_by_token(48, 0)
    dpo = DPO(config, pairs, model, 0, ALONE)
    learner = Learner(config, ALONE, model, None, 1e-3, 1e-3)
    drawn = draw_responses(model, [[5, 6]] * 16, config.rlhf, manifest, make_generator(0), 16)
    rollout = examine(drawn, learner, model, NoScore(), config.rlhf, 16)
    seen = []
    for number in range(3):
        sides = dpo.prepare(rollout, 0.0, 16 * number).sides
        seen += [tuple(prompt) for prompt in sides.tokens[:16, :2].tolist()]
    assert sorted(seen) == sorted(tuple(pair.prompt) for pair in pairs)


def test_selected_pairs_keep_their_sides_together(config, dense_folder):
    model = load_model(dense_folder).eval()
    dpo = DPO(config, pairs_by_token(6, 0), model, 0, ALONE)

    class SixRows:
        sequences = make_sequences([[1]] * 6, [[1]] * 6, 0, "cpu")

    rows = dpo.prepare(SixRows, 0.0, 0)
    part = rows.select(torch.tensor([4, 1]))
    assert len(part) == 2
    expected = rows.sides.tokens[[4, 1, 10, 7]]
    assert torch.equal(part.sides.tokens, expected)
    assert torch.equal(part.reference_logprobs, rows.reference_logprobs[[4, 1, 10, 7]])
