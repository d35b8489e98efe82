"""Our objectives against TRL's own functions on the same tensors. TRL 1.16 has no PPO; what it has is all here."""

from types import SimpleNamespace

import pytest
import torch

from ultrathink_model.alignment.experience import Experience
from ultrathink_model.alignment.grpo import GRPO
from ultrathink_model.alignment.objectives import group_advantages, preference_loss
from ultrathink_model.alignment.sequences import Sequences, token_entropies, token_logprobs
from ultrathink_model.config.rlhf import RLHFConfig
from ultrathink_model.models.transformer import ModelOutput

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is a development package")

BATCH, RESPONSE, VOCAB, EPSILON = 4, 5, 11, 0.2


def draws(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def experience() -> Experience:
    mask = torch.arange(RESPONSE)[None] < torch.tensor([[5], [3], [1], [4]])
    old = -draws(BATCH, RESPONSE, seed=1).abs()
    nothing = torch.zeros(BATCH, RESPONSE)
    advantages = draws(BATCH, 1, seed=3).expand(BATCH, RESPONSE)
    tokens = torch.arange(BATCH * (2 + RESPONSE)).view(BATCH, 2 + RESPONSE) % VOCAB
    sequences = Sequences(tokens, None, mask)
    return Experience(sequences, old, old + 0.3 * draws(BATCH, RESPONSE, seed=2), advantages, nothing, nothing)


def test_logprobs_and_entropies_equal_trls():
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits, tokens = draws(BATCH, RESPONSE, VOCAB, seed=0), torch.arange(20).view(BATCH, RESPONSE) % VOCAB
    torch.testing.assert_close(token_logprobs(logits, tokens), selective_log_softmax(logits, tokens))
    torch.testing.assert_close(token_entropies(logits), entropy_from_logits(logits))


class LogitsAsPolicy:
    """A policy whose response logits are a leaf tensor; of the positions before them nobody asks."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def forward(self, tokens: torch.Tensor, attention_mask: None, logits_from: int) -> ModelOutput:
        assert tokens.shape[1] - logits_from == RESPONSE
        return ModelOutput(torch.zeros(*tokens.shape, 1), self._logits)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.03])
def test_grpo_loss_and_gradient_equal_trls(experience, entropy_weight):
    rlhf = RLHFConfig(algorithm="grpo", clip_range=EPSILON, entropy_weight=entropy_weight, kl_weight=0.07)
    logits = draws(BATCH, RESPONSE, VOCAB, seed=4).requires_grad_()
    terms = GRPO(rlhf).terms(LogitsAsPolicy(logits), experience)
    own = terms.loss / terms.count
    own.backward()
    gradient, logits.grad = logits.grad.clone(), None
    logprobs = token_logprobs(logits, experience.sequences.responses)
    theirs = _trl_grpo_loss(rlhf, experience, logprobs, token_entropies(logits))
    theirs.backward()
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(gradient, logits.grad)
    assert terms.sums["clip_fraction"] > 0


def _trl_grpo_loss(rlhf: RLHFConfig, rows: Experience, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """TRL's own method, on an object that holds what it reads and nothing else; "bnpo" is the mean over tokens."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_args, **_kwargs: (logprobs, entropy, None),
        _entropy_bonus_enabled=rlhf.entropy_weight != 0,
        _metrics={"train": _Lists()},
        accelerator=SimpleNamespace(
            gather=lambda value: value,
            num_processes=1,
            reduce=lambda value, reduction: value,
            sync_gradients=True,
        ),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False,
        beta=rlhf.kl_weight,
        current_gradient_accumulation_steps=1,
        entropy_coef=rlhf.entropy_weight,
        epsilon_high=EPSILON,
        epsilon_low=EPSILON,
        importance_sampling_level="token",
        loss_type="bnpo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
    )
    mask = rows.sequences.response_mask
    inputs = {
        "prompt_ids": rows.sequences.tokens[:, :2],
        "prompt_mask": torch.ones(BATCH, 2, dtype=torch.long),
        "completion_ids": rows.sequences.responses,
        "completion_mask": mask.long(),
        "advantages": rows.advantages[:, 0],
        "old_per_token_logps": rows.old_logprobs,
        "ref_per_token_logps": rows.reference_logprobs,
        "num_items_in_batch": mask.sum(),
    }
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


class _Lists(dict):
    def __missing__(self, name: str) -> list[float]:
        self[name] = []
        return self[name]


def test_group_advantages_equal_trls_formula():
    scores = draws(12, seed=5)
    groups = scores.view(-1, 4)
    spread = groups.std(dim=1).repeat_interleave(4)
    expected = (scores - groups.mean(dim=1).repeat_interleave(4)) / (spread + 1e-4)  # as in its _generate_and_score
    torch.testing.assert_close(group_advantages(scores, GRPO(RLHFConfig(group_size=4)).group_size, True), expected)


def test_dpo_loss_equals_trls():
    from trl.trainer.dpo_trainer import DPOTrainer

    beta, mask = 0.3, torch.ones(BATCH, RESPONSE + 1, dtype=torch.long)
    logprobs, reference = -draws(BATCH, RESPONSE, seed=6).abs(), -draws(2, seed=7).abs()
    reference_rejected = -draws(2, seed=8).abs()
    outputs = SimpleNamespace(
        log_probs=logprobs,
        entropy=torch.zeros(BATCH, RESPONSE),
        mean_logits=torch.zeros(BATCH, RESPONSE),
        is_top1=torch.zeros(BATCH, RESPONSE, dtype=torch.bool),
    )
    same = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = SimpleNamespace(
        _metrics={"train": _Lists()},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=same,
        aux_loss_enabled=False,
        beta=beta,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros(BATCH, RESPONSE + 1, dtype=torch.long),
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": reference,
        "ref_rejected_logps": reference_rejected,
    }
    theirs = DPOTrainer._compute_loss(trainer, lambda **_kwargs: outputs, inputs, return_outputs=False)
    chosen, rejected = logprobs.sum(1).chunk(2)
    own = preference_loss(beta * (chosen - reference), beta * (rejected - reference_rejected)).mean()
    torch.testing.assert_close(own, theirs)
