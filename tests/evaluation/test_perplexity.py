import math
from dataclasses import dataclass

import pytest
import torch

from ultrathink_model.errors import DataError
from ultrathink_model.evaluation.perplexity import ValidationLoss, bits_per_byte, validation_loss
from ultrathink_model.models.transformer import build_model


@dataclass
class Losses:
    """A batch that is its own output: some tokens, and the loss of each in nats."""

    values: list[float]

    @property
    def num_tokens(self) -> int:
        return len(self.values)

    @property
    def loss_sum(self) -> torch.Tensor:
        return torch.tensor(sum(self.values))

    def to(self, device):
        return self


def identity(value):
    return value


def test_loss_is_the_mean_over_tokens_not_over_batches():
    found = validation_loss(identity, [Losses([1.0, 2.0, 3.0]), Losses([10.0])], "cpu", identity)
    assert found == ValidationLoss(4.0, 4)


def test_loss_over_ranks_equals_loss_in_one_process():
    first, second = [Losses([1.0, 2.0, 3.0])], [Losses([10.0]), Losses([])]
    sums = []

    def collect(totals):
        sums.append(totals)
        return totals

    validation_loss(identity, first, "cpu", collect)
    other_rank = sums[0]
    on_second = validation_loss(identity, second, "cpu", lambda totals: totals + other_rank)
    assert on_second == validation_loss(identity, first + second, "cpu", identity)


def test_many_small_losses_do_not_vanish_beside_a_large_sum():
    batches = [Losses([2.0**24]), *[Losses([1.0])] * 64]
    # In float32, 2**24 + 1 is 2**24: the 64 nats after the first would be lost.
    assert validation_loss(identity, batches, "cpu", identity).nats == 2.0**24 + 64


def test_split_without_tokens_is_refused_with_the_remedy():
    with pytest.raises(DataError, match="validation_every"):
        validation_loss(identity, [Losses([])], "cpu", identity)


def test_uniform_model_has_the_logarithm_of_its_vocabulary_as_loss(tiny_config):
    model = build_model(tiny_config).eval()
    torch.nn.init.zeros_(model.embedding.weight)

    @dataclass
    class Rows:
        tokens: torch.Tensor

        @property
        def num_tokens(self):
            return self.tokens.numel()

        def to(self, device):
            return self

    batches = [Rows(torch.randint(0, 300, (rows, 32))) for rows in (4, 1)]
    found = validation_loss(lambda batch: model(batch.tokens, labels=batch.tokens), batches, "cpu", identity)
    assert found.loss == pytest.approx(math.log(300), abs=1e-6)
    assert found.perplexity == pytest.approx(300, rel=1e-5)
    assert found.tokens == 5 * 32


def test_no_gradient_is_kept(tiny_config):
    model = build_model(tiny_config)
    outputs = []

    def forward(batch):
        outputs.append(model(torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)))
        return outputs[-1]

    validation_loss(forward, [Losses([0.0] * 4)], "cpu", identity)
    assert not outputs[0].loss_sum.requires_grad


def test_uniform_bytes_cost_eight_bits_each():
    loss = ValidationLoss(math.log(256), 1000)
    assert loss.bits_per_byte(1000) == pytest.approx(8)
    # The same nats over tokens of four bytes each are two bits a byte.
    assert loss.bits_per_byte(4000) == pytest.approx(2)


def test_bits_per_byte_of_an_empty_text_is_refused():
    with pytest.raises(DataError, match="0 bytes"):
        bits_per_byte(1.0, 0)


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert ValidationLoss(1000.0, 1).perplexity == math.inf
