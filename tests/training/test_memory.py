import pytest
import torch

from ultrathink_model.config import make_config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.training.memory import OutOfMemoryError, explained_memory, memory_remedies

CPU = RankContext(0, 0, 1, torch.device("cpu"))


def test_a_failed_allocation_names_the_remedies_that_fit():
    config = make_config({"training": {"batch_size": 8}})
    with (
        pytest.raises(OutOfMemoryError, match=r"rank 0 .*tried to allocate.*training.batch_size=4") as raised,
        explained_memory(config, CPU),
    ):
        torch.empty(1 << 52)
    assert raised.value.exit_code == 2


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained_memory(make_config({}), CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_remedies_leave_out_what_is_done_already():
    config = make_config(
        {
            "model": {"gradient_checkpointing": True, "vocab_size": 1000},
            "training": {"batch_size": 1, "use_amp": True},
            "distributed": {"enabled": True, "strategy": "fsdp", "cpu_offload": True},
        }
    )
    assert memory_remedies(config) == ["model.max_seq_length=512 (another data set), or a smaller model"]


def test_remedies_hold_the_arithmetic():
    config = make_config({"distributed": {"enabled": True}, "training": {"loss_chunk_size": 2048}})
    remedies = " ".join(memory_remedies(config))
    assert "training.loss_chunk_size=668 (logits of 2048 tokens at once are 822 MB)" in remedies
    assert "training.batch_size=4 training.gradient_accumulation_steps=2" in remedies
    assert "distributed.strategy=fsdp" in remedies
