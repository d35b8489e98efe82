"""Use of the processor, memory, disk, network and GPUs, sampled while a run goes on."""

import importlib
import importlib.util
import threading
from pathlib import Path
from types import ModuleType

import psutil

from ultrathink_model.tracking.metrics import MetricsWriter, read_metrics

SAMPLE_SECONDS = 10.0
MEGABYTE = 1e6


class SystemSampler:
    """A thread that appends `system/*` metrics of this machine to a file in the form of `metrics.jsonl`.

    The names are those of MLflow's own monitor, so that its page of system metrics shows them. That monitor is
    not used because it ends at the first request that fails. A line's step is the number of the sample; one
    sample costs about a millisecond.
    """

    def __init__(self, path: Path, interval: float = SAMPLE_SECONDS) -> None:
        """Starts sampling.

        Args:
            path: The file to append to; the numbers of its samples go on where they ended.
            interval: Seconds between samples.
        """
        self._writer = MetricsWriter(path)
        self._folder = path.parent
        self._interval = interval
        self._sample_number = len(read_metrics(path))
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()
        self._gpus = _gpu_library()
        self._stop = threading.Event()
        psutil.cpu_percent()  # the first call only sets the point that the next one measures from
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Takes a last sample and ends the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(self._interval)
            self._writer.write(self._sample_number, self._sample())
            self._sample_number += 1

    def _sample(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._folder))
        network = psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": self._process.memory_info().rss / MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / MEGABYTE,
            **self._sample_gpus(),
        }
        return {f"system/{name}": value for name, value in values.items()}

    def _sample_gpus(self) -> dict[str, float]:
        if self._gpus is None:
            return {}
        values: dict[str, float] = {}
        for index in range(self._gpus.nvmlDeviceGetCount()):
            device = self._gpus.nvmlDeviceGetHandleByIndex(index)
            memory = self._gpus.nvmlDeviceGetMemoryInfo(device)
            values[f"gpu_{index}_utilization_percentage"] = self._gpus.nvmlDeviceGetUtilizationRates(device).gpu
            values[f"gpu_{index}_memory_usage_megabytes"] = memory.used / MEGABYTE
            values[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
        return values


def _gpu_library() -> ModuleType | None:
    """NVIDIA's management library, ready for use; None where the package or the driver is not there."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    library = importlib.import_module("pynvml")
    try:
        library.nvmlInit()
    except library.NVMLError:
        return None
    return library
