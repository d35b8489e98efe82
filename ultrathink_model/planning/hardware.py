"""Devices by name: memory, peak speed, and what an hour of one costs."""

from dataclasses import dataclass

from ultrathink_model.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        title: Its name in full.
        driver_name: What the driver's name for it holds.
        memory_gib: Memory that a process can use.
        tflops: Peak of dense matrix products under mixed precision, in 10¹² operations a second.
        tflops_fp32: The same in float32.
        watts: Most power that it draws.
        price: US dollars an hour for one in a large cloud, on demand; None where none rents it out.
    """

    title: str
    driver_name: str
    memory_gib: float
    tflops: float
    tflops_fp32: float
    watts: float
    price: float | None = None


# Speeds and powers from NVIDIA's data sheets, without sparsity. Prices: AWS and Google Cloud lists for the United States, 2025,
# the instance's price over its accelerators; they move, so `--price` overrides them.
DEVICES = {
    "gtx-1080-ti": Device("NVIDIA GTX 1080 Ti", "GTX 1080 Ti", 11, 11.3, 11.3, 250),
    "rtx-3090": Device("NVIDIA RTX 3090", "RTX 3090", 24, 71, 35.6, 350),
    "rtx-4090": Device("NVIDIA RTX 4090", "RTX 4090", 24, 165, 82.6, 450),
    "t4": Device("NVIDIA T4", "T4", 15, 65, 8.1, 70, 0.53),
    "v100": Device("NVIDIA V100 16 GB", "V100", 16, 125, 15.7, 300, 3.06),
    "l4": Device("NVIDIA L4", "L4", 22.5, 121, 30.3, 72, 0.71),
    "l40s": Device("NVIDIA L40S", "L40S", 45, 362, 91.6, 350, 1.86),
    "a10": Device("NVIDIA A10", "A10", 22.5, 125, 31.2, 150),
    "a10g": Device("NVIDIA A10G", "A10G", 22.5, 70, 31.2, 300, 1.01),
    "a100-40gb": Device("NVIDIA A100 40 GB", "A100", 40, 312, 19.5, 400, 4.10),
    "a100-80gb": Device("NVIDIA A100 80 GB", "A100", 80, 312, 19.5, 400, 5.12),
    "h100-pcie": Device("NVIDIA H100 PCIe 80 GB", "H100 PCIe", 80, 756, 51, 350),
    "h100": Device("NVIDIA H100 SXM 80 GB", "H100", 80, 989, 67, 700, 6.88),
    "h200": Device("NVIDIA H200", "H200", 141, 989, 67, 700, 7.91),
    "b200": Device("NVIDIA B200", "B200", 180, 2250, 75, 1000),
}


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ConfigError: There is no such name.
    """
    if name not in DEVICES:
        raise ConfigError(f"--device {name} is not known; take one of {', '.join(DEVICES)}.")
    return DEVICES[name]


def device_of_driver(name: str) -> Device | None:
    """The device that the driver calls so, as in `NVIDIA A100-SXM4-40GB`: the longest name that fits; None for others."""
    known = [device for device in DEVICES.values() if device.driver_name in name]
    return max(known, key=lambda device: len(device.driver_name), default=None)
