"""Bandits whose optimum is known: one token is drawn, and one of 16 tokens pays."""

import copy
import math

import pytest
import torch
from alignment_cases import ALONE, VALUES

from ultrathink_model.alignment.draws import make_generator
from ultrathink_model.alignment.grpo import GRPO
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.ppo import PPO, ValueHead
from ultrathink_model.alignment.rollout import draw_responses, examine
from ultrathink_model.alignment.sequences import make_sequences, response_states
from ultrathink_model.alignment.update import KLLimit, update_policy
from ultrathink_model.config import Config, make_config, override_config
from ultrathink_model.models.transformer import build_model

VOCAB, PAYS, PROMPT = 16, 3, [1, 2]
NO_LIMIT = KLLimit(0.0, math.inf)


class PaysForOneToken:
    def score(self, sequences):
        return (sequences.responses[:, 0] == PAYS).float()


@pytest.fixture
def bandit_config(base_config) -> Config:
    rlhf = {
        "response_tokens": 1,
        "ppo_batch_size": 128,
        "ppo_minibatch_size": 64,
        "ppo_epochs": 2,
        "group_size": 8,
        "policy_learning_rate": 3e-3,
        "value_learning_rate": 3e-3,
        "entropy_weight": 0.0,
    }
    return make_config({**VALUES, "model": {**VALUES["model"], "vocab_size": VOCAB}, "rlhf": rlhf})


def play(config: Config, manifest, rounds: int, kl_weight: float) -> tuple[float, float]:
    """Probability of the paying token before and after some rounds."""
    rlhf = config.rlhf
    manifest = manifest.model_copy(update={"eos_id": VOCAB - 1, "pad_id": VOCAB - 1})
    policy = build_model(config).eval()
    reference = copy.deepcopy(policy)
    head = ValueHead(config.model.hidden_size, make_generator(0)) if rlhf.algorithm == "ppo" else None
    algorithm = PPO(rlhf) if rlhf.algorithm == "ppo" else GRPO(rlhf)
    learner = Learner(config, ALONE, policy, head, rlhf.policy_learning_rate, rlhf.value_learning_rate)
    before = probability(policy)
    for number in range(rounds):
        prompts = [PROMPT] * rlhf.ppo_batch_size
        drawn = draw_responses(policy, prompts, rlhf, manifest, make_generator(7, number), 128)
        rollout = examine(drawn, learner, reference, PaysForOneToken(), rlhf, 128)
        rows = algorithm.prepare(rollout, kl_weight, 0)
        update_policy(learner, algorithm, rows, config, number, NO_LIMIT)
    return before, probability(policy)


def probability(model) -> float:
    with torch.no_grad():
        logits, _ = response_states(model, make_sequences([PROMPT], [[0]], 0, "cpu"), 1.0)
    return float(logits[0, 0].softmax(-1)[PAYS])


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_paying_token_is_found(bandit_config, manifest, algorithm):
    before, after = play(override_config(bandit_config, [f"rlhf.algorithm={algorithm}"]), manifest, 15, kl_weight=0.0)
    assert before < 0.12
    assert after > 0.9


def test_ppo_finds_the_optimum_under_a_kl_price(bandit_config, manifest):
    # The best policy for E[score] - β·KL(policy ‖ reference) is p_ref(token)·exp(score / β), normalised.
    config, weight = override_config(bandit_config, ["rlhf.whiten_advantages=false"]), 0.35
    before, after = play(config, manifest, 60, weight)
    paid = before * math.exp(1 / weight)
    # Tolerance: rounds of 128 draws leave the probability's own estimate with a deviation of 0.04.
    assert after == pytest.approx(paid / (paid + 1 - before), abs=0.1)


def test_grpo_finds_the_optimum_under_a_kl_price(bandit_config, manifest):
    # Its estimate r - 1 - log r has, on the policy's own draws, the gradient of KL(reference ‖ policy). A group's mean
    # holds the response itself, which scales its advantage by (n - 1) / n. So the optimum maximises
    # c·q + β (p log q + (1 - p) log(1 - q)) over the probability q of the paying token, p being the reference's.
    config = override_config(bandit_config, ["rlhf.algorithm=grpo", "rlhf.whiten_advantages=false"])
    weight, scale = 1.0, 7 / 8
    before, after = play(config, manifest, 60, weight)
    low, high = 1e-6, 1 - 1e-6
    for _ in range(60):
        q = (low + high) / 2
        slope = scale + weight * (before / q - (1 - before) / (1 - q))
        low, high = (q, high) if slope > 0 else (low, q)
    assert 0.2 < low < 0.8
    assert after == pytest.approx(low, abs=0.1)
