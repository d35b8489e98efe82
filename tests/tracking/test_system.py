import time

from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.tracking.system import SystemSampler


def test_samples_go_on_counting_over_restarts(tmp_path):
    path = tmp_path / "system_metrics.jsonl"
    for _ in range(2):
        sampler = SystemSampler(path, interval=0.02)
        time.sleep(0.1)
        sampler.stop()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= 4
    assert all(0 < row["system/system_memory_usage_percentage"] < 100 for row in rows)


def test_a_sample_costs_little(tmp_path):
    sampler = SystemSampler(tmp_path / "system_metrics.jsonl", interval=1000)
    started = time.thread_time()
    for _ in range(20):
        sampler._sample()
    assert (time.thread_time() - started) / 20 < 0.02
    sampler.stop()
