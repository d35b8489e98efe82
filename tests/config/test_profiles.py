"""Which profile a machine gets, and why."""

import os
import stat

import pytest

from ultrathink_model.config.profiles import choose_profile, gpu_memory, profile_path, resolve_profile
from ultrathink_model.errors import ConfigError


@pytest.mark.parametrize(
    ("memory", "profile"),
    [
        ([], "tiny"),
        ([2.0], "tiny"),
        ([3.9], "small"),  # a card sold with 4 GB
        ([8.0], "small"),
        ([8.0, 8.0], "small"),
        ([14.7], "small"),
        ([15.9], "medium"),  # a card sold with 16 GB
        ([24.0], "medium"),
        ([39.4], "large"),  # an A100 of 40 GB
        ([79.6], "large"),
        ([24.0, 24.0], "large"),
        ([80.0, 8.0], "small"),
    ],
)
def test_auto_takes_the_profile_that_the_smallest_gpu_allows(memory, profile):
    choice = choose_profile(memory)
    assert choice.profile == profile
    assert choice.reason.startswith(f"profile {profile}: ")
    assert "\n" not in choice.reason


def test_a_profile_asked_for_is_taken():
    assert resolve_profile("medium").profile == "medium"


@pytest.mark.parametrize("name", ["huge", "", "../train_tiny"])
def test_an_unknown_profile_is_refused(name):
    with pytest.raises(ConfigError, match="take auto or one of tiny, small, medium, large"):
        profile_path(name)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("script", "memory"),
    [
        ("echo 16384\necho 40960", [16.0, 40.0]),
        ("echo '[N/A]'", []),
        ("echo no devices were found; exit 6", []),
    ],
)
def test_gpu_memory_is_what_nvidia_smi_tells(script, memory, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() == memory


def test_no_gpu_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() == []
