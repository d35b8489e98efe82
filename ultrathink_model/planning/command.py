"""`run.py plan`: what a run needs, and whether it fits a device."""

import argparse
from collections.abc import Iterator

from ultrathink_model.command_line import ArgumentParser, add_config_flags, given_config
from ultrathink_model.config import Config, override_config
from ultrathink_model.errors import ConfigError
from ultrathink_model.planning.hardware import DEVICES, Device, find_device
from ultrathink_model.planning.plan import GIB, Plan, make_plan
from ultrathink_model.planning.table import describe, describe_device

# What well-tuned training reaches of a data sheet's peak.
USUAL_UTILISATION = 0.4
TRIED_RANKS = (2, 4, 8, 16, 32, 64)


def make_parser() -> ArgumentParser:
    """The flags of `run.py plan`."""
    parser = ArgumentParser(prog="run.py plan", description=__doc__ or "")
    add_config_flags(parser)
    parser.add_argument("--device", metavar="NAME", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--ranks", type=_positive, default=1, metavar="N", help="devices that train together")
    parser.add_argument("--samples", type=_positive, metavar="N", help="training sequences, for the time")
    parser.add_argument(
        "--utilisation", type=float, default=USUAL_UTILISATION, metavar="SHARE", help="of the device's peak (0.4)"
    )
    parser.add_argument("--price", type=float, metavar="USD", help="of one device for an hour")
    return parser


def main(arguments: list[str]) -> None:
    """Prints the plan.

    Raises:
        ConfigError: The config cannot be used, or the run does not fit the device.
    """
    given = make_parser().parse_args(arguments)
    config = given_config(given)
    device = find_device(given.device) if given.device else None
    plan = make_plan(config, given.ranks, given.samples)
    print(describe(plan))
    if device is None:
        return
    print("\n" + describe_device(plan, given.device, device, given.utilisation, given.price))
    if not plan.fits(device):
        raise ConfigError(_explain(plan, config, device))


def _explain(plan: Plan, config: Config, device: Device) -> str:
    start = f"{plan.memory.total / GIB:,.1f} GiB a rank do not fit {device.title} with {device.memory_gib:g} GiB"
    remedies = list(_remedies(plan, config, device))
    return f"{start}. What fits: {'; '.join(remedies)}." if remedies else f"{start}, nor does what could be tried."


def _remedies(plan: Plan, config: Config, device: Device) -> Iterator[str]:
    """Changes after which the run fits, each with its figure, the mildest first."""
    changes: list[str] = []
    if not config.model.gradient_checkpointing:
        changes.append("model.gradient_checkpointing=true")
    if config.training.batch_size > 1:
        changes.append("training.batch_size=1")
    for number in range(1, len(changes) + 1):
        smaller = make_plan(override_config(config, changes[:number]), plan.ranks)
        if smaller.fits(device):
            yield f"{' '.join(changes[:number])} ({smaller.memory.total / GIB:,.1f} GiB)"
            break
    for ranks in TRIED_RANKS:
        sharded = [*changes[:1], "distributed.enabled=true", "distributed.strategy=fsdp"]
        wider = make_plan(override_config(config, sharded), ranks)
        if ranks >= plan.ranks and wider.fits(device):
            yield f"{' '.join(sharded)} over {ranks} devices ({wider.memory.total / GIB:,.1f} GiB)"
            return


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number
