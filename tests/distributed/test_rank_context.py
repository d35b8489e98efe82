import socket
import time

import pytest
import torch.distributed as dist

from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import init_distributed


@pytest.fixture
def alone(monkeypatch):
    """The environment of rank 0 of two, whose other never comes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_rank_waits_for_the_others_as_long_as_timeout_seconds_says(tiny_config, alone):
    config = override_config(tiny_config, ["distributed.enabled=true", "distributed.timeout_seconds=1"])
    started = time.monotonic()
    with pytest.raises(dist.DistError, match=r"[Tt]imed? ?out"):
        init_distributed(config)
    assert 1 <= time.monotonic() - started < 10
