"""Trains one run from a config, without ZenML: by python, torchrun, deepspeed, SageMaker or Vertex AI.

    python train_advanced.py --config configs/train_tiny.yaml
    torchrun --nproc_per_node=4 train_advanced.py --config configs/train_large.yaml --override distributed.enabled=true

Started again, the same command goes on from the newest checkpoint in its folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ultrathink_model.command_line import ArgumentParser, log_to_terminal, require_packages, run_and_exit


def make_parser() -> ArgumentParser:
    """The flags of train_advanced.py."""
    parser = ArgumentParser(prog="train_advanced.py", description=__doc__ or "", epilog=_describe_keys)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="the YAML file of the run")
    source.add_argument("--profile", metavar="NAME", help="auto, tiny, small, medium or large, in place of --config")
    parser.add_argument(
        "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="section.key=value, …"
    )
    parser.add_argument("--init-from", metavar="FOLDER", help="a final_model/ to take the first weights from")
    parser.add_argument(
        "--resume", metavar="auto|never|PATH", help="go on from where: short for --override training.resume=…"
    )
    parser.add_argument("--run-name", metavar="NAME", help="name of the run; by default the config file's")
    # DeepSpeed's launcher passes it; the rank is read from the environment, which torchrun sets too.
    parser.add_argument("--local_rank", "--local-rank", type=int, help="ignored: set by launchers")
    return parser


def main() -> None:
    """Parses the command line, trains, and says where the results are.

    Raises:
        UltrathinkError: A mistake of the user's, or a stop by a signal.
    """
    arguments = make_parser().parse_args()
    from ultrathink_model.config import load_config  # noqa: PLC0415 - after --help
    from ultrathink_model.config.profiles import profile_path, resolve_profile  # noqa: PLC0415

    path = arguments.config
    if path is None:
        choice = resolve_profile(arguments.profile)
        print(choice.reason)
        path = profile_path(choice.profile)
    overrides = list(arguments.override)
    if arguments.resume:
        overrides.append(f"training.resume={arguments.resume}")
    config = load_config(path, overrides)
    log_to_terminal(config.logging.log_level)
    from ultrathink_model.stage import describe_results, run_stage  # noqa: PLC0415 - torch takes seconds to import

    init_from = Path(arguments.init_from) if arguments.init_from else None
    run_stage(config, init_from=init_from, run_name=arguments.run_name or Path(path).stem)
    describe_results(config)


def _describe_keys() -> str:
    from ultrathink_model.config.describe import render_text  # noqa: PLC0415 - only for --help

    return render_text()


if __name__ == "__main__":
    require_packages("train_advanced.py")
    run_and_exit(main)
