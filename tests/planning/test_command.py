"""`run.py plan` as a process: its figures, its exit codes, and no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from ultrathink_model.config import load_config, override_config
from ultrathink_model.config.profiles import profile_path
from ultrathink_model.planning import make_plan
from ultrathink_model.planning.hardware import DEVICES

ROOT = Path(__file__).resolve().parents[2]


def plan(*arguments):
    command = [sys.executable, "-X", "importtime", str(ROOT / "run.py"), "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def messages(done):
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def test_a_run_that_fits_has_its_time_and_cost():
    done = plan("--profile", "small", "--device", "a100-40gb", "--samples", "100000")
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout
    assert "training tokens: 102,400,000" in done.stdout
    assert "$" in done.stdout
    assert not messages(done)
    assert " torch" not in done.stderr, "torch takes seconds to import"


def test_a_run_that_cannot_fit_ends_with_2_and_what_would():
    done = plan("--profile", "large", "--device", "a100-40gb")
    assert done.returncode == 2
    assert "do not fit NVIDIA A100 40 GB with 40 GiB. What fits:" in messages(done)[0]
    assert "distributed.strategy=fsdp" in messages(done)[0]


def test_the_remedy_that_is_named_fits():
    config = load_config(profile_path("medium"))
    device = DEVICES["rtx-3090"]
    assert not make_plan(config).fits(device)
    named = messages(plan("--profile", "medium", "--device", "rtx-3090"))[0]
    remedy = named.partition("What fits: ")[2].partition(" over ")
    ranks = int(remedy[2].split()[0])
    assert make_plan(override_config(config, remedy[0].split()), ranks).fits(device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device abacus is not known; take one of gtx-1080-ti"),
        (["--profile", "huge"], "--profile huge does not exist"),
        (["--override", "model.hiden_size=3"], "model.hidden_size"),
        (["--ranks", "0"], "0 is less than 1"),
    ],
)
def test_a_mistake_ends_with_2_and_its_message(arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2
    assert message in "\n".join(messages(done))
    assert "Traceback" not in done.stderr


def test_bounds_of_the_config_give_the_tokens():
    config = load_config(profile_path("tiny"))
    assert make_plan(config).tokens == 1600 * 256
    assert make_plan(override_config(config, ["training.max_steps=10"])).tokens == 10 * 8 * 256
    assert make_plan(override_config(config, ["training.max_steps=10"]), ranks=4).tokens == 4 * 10 * 8 * 256
    assert make_plan(override_config(config, ["data.train_samples=null"])).tokens is None


def test_sharding_over_the_same_devices_is_a_remedy():
    named = messages(plan("--profile", "large", "--device", "a100-80gb", "--ranks", "8"))[0]
    assert "distributed.strategy=fsdp over 8 devices" in named
