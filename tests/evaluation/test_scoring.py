import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.data.pack import IGNORED
from ultrathink_model.evaluation.scoring import score_tokens, text_logprobs
from ultrathink_model.models.transformer import build_model


@pytest.fixture
def model(tiny_config):
    return build_model(override_config(tiny_config, ["training.loss_chunk_size=7"])).eval()


def test_scores_are_those_of_the_logits(model):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (3, 12), generator=generator)
    labels = torch.randint(0, 300, (3, 12), generator=generator)
    labels[0, :5] = IGNORED
    scores = score_tokens(model, tokens, labels)
    with torch.no_grad():
        logprobs = model(tokens).logits.log_softmax(-1)
    confidence, top = logprobs.exp().max(-1)
    torch.testing.assert_close(scores.confidence[scores.counts], confidence[labels != IGNORED])
    expected = -logprobs.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(scores.nats, expected * (labels != IGNORED))
    assert torch.equal(scores.is_right, (top == labels) & (labels != IGNORED))
    with torch.no_grad():
        total = model(tokens, labels=labels).loss_sum
    torch.testing.assert_close(scores.nats.sum(), total)


def test_a_text_has_the_same_probability_in_any_batch(model):
    texts = [list(range(1, length)) for length in (3, 12, 5, 2, 8)]
    together = text_logprobs(model, texts, pad_id=0, batch_tokens=1000)
    one_by_one = [text_logprobs(model, [text], pad_id=0, batch_tokens=1)[0] for text in texts]
    # Sums of at most 11 float32 log-probabilities near 6.
    assert together == pytest.approx(one_by_one, abs=1e-4)
    assert text_logprobs(model, texts, pad_id=0, batch_tokens=20) == pytest.approx(one_by_one, abs=1e-4)
