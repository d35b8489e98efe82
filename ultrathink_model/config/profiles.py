"""The profiles: shipped configs by size, and which one this machine can train."""

import shutil
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ultrathink_model.errors import ConfigError

ProfileName = Literal["tiny", "small", "medium", "large"]

PROFILES: tuple[ProfileName, ...] = get_args(ProfileName)
CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"

# GiB of memory on one GPU, from the guide's hardware lines. Cards report up to 3 % less than they are sold with.
SMALL_GPU = 4 * 0.97
MEDIUM_GPU = 16 * 0.97
LARGE_GPU = 40 * 0.97
NVIDIA_SMI_SECONDS = 10


class Choice(NamedTuple):
    """A profile, and one line that says why it was taken."""

    profile: ProfileName
    reason: str


def profile_path(profile: str) -> Path:
    """The YAML file of a profile.

    Raises:
        ConfigError: There is no such profile, or its file is missing.
    """
    if profile not in PROFILES:
        raise ConfigError(f"--profile {profile} does not exist; take auto or one of {', '.join(PROFILES)}.")
    path = CONFIG_FOLDER / f"train_{profile}.yaml"
    if not path.is_file():
        raise ConfigError(f"--profile {profile}: {path} is missing; name a file with --config instead.")
    return path


def resolve_profile(profile: str) -> Choice:
    """The profile asked for; `auto` takes the largest one that the guide gives this machine's GPUs."""
    if profile == "auto":
        return choose_profile(gpu_memory())
    profile_path(profile)
    return Choice(profile, f"profile {profile}: asked for")  # type: ignore[arg-type]  # profile_path refuses others


def choose_profile(memory: list[float]) -> Choice:
    """The profile for GPUs with so much memory each.

    Args:
        memory: GiB of each GPU; empty for a machine without one.
    """
    if not memory:
        return Choice("tiny", "profile tiny: no NVIDIA GPU was found, and a processor trains this one in minutes")
    several = len(memory) > 1
    found = f"{len(memory)} GPUs, the smallest of {min(memory):.0f} GiB" if several else f"a GPU of {memory[0]:.0f} GiB"
    # Ranks share the work evenly: the smallest card sets what fits.
    size = min(memory)
    if size >= LARGE_GPU or (several and size >= MEDIUM_GPU):
        return Choice("large", f"profile large: found {found} (large is for 40 GiB, or several of 16 GiB, and more)")
    if size >= MEDIUM_GPU:
        return Choice("medium", f"profile medium: found {found} (medium is for 16 to 40 GiB)")
    if size >= SMALL_GPU:
        return Choice("small", f"profile small: found {found} (small is for 4 to 16 GiB)")
    return Choice("tiny", f"profile tiny: found {found}, less than the 4 GiB of profile small")


def gpu_memory() -> list[float]:
    """GiB of memory of each NVIDIA GPU, as `nvidia-smi` tells it; empty where there is no such GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode != 0:
        return []
    return [float(line) / 1024 for line in answer.stdout.split("\n") if line.strip().replace(".", "", 1).isdigit()]
