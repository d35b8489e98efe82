"""The command line for people: runs a workflow from raw text to an evaluated, exported model.

python run.py --workflow prototype
python run.py --workflow production --profile small --override training.max_steps=2000
python run.py plan --profile large --device a100-80gb --ranks 8
python run.py export outputs/tiny_model/prototype/pretrain/final_model exported --override 'export.formats=[gguf]'
python run.py chat
python run.py serve
python run.py doctor
python run.py stacks apply stack_configs/local.yaml
python run.py status
python run.py rerun RUN --from evaluate_rlhf
"""

import functools
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ultrathink_model.command_line import ArgumentParser, require_packages, run_and_exit

WORKFLOWS = {
    "prototype": "a check on dummy data, then one epoch on real text",
    "production": "pretrain → resume with MoE and the reasoning engine → RLHF",
    "multi_gpu": "the same training over several ranks",
}
# Commands beside the workflows, each with flags of its own (`run.py plan --help`).
COMMANDS = {
    "plan": ("ultrathink_model.planning.command", ("pydantic", "yaml")),
    "export": ("ultrathink_model.export.command", ("pydantic", "yaml", "torch", "transformers")),
    "chat": ("ultrathink_model.serving.chat", ("pydantic", "yaml", "torch", "transformers")),
    "serve": ("ultrathink_model.serving.serve", ("pydantic", "yaml", "torch", "transformers")),
    "stacks": ("pipelines.stacks_command", ("pydantic", "yaml", "zenml")),
    "status": ("pipelines.status_command", ("pydantic", "yaml", "zenml")),
    "rerun": ("pipelines.rerun_command", ("pydantic", "yaml", "torch", "zenml", "mlflow", "datasets", "transformers")),
    "compare": ("ultrathink_model.reporting.compare", ("pydantic", "yaml", "jinja2")),
    "promote": ("ultrathink_model.promotion.command", ("pydantic", "yaml", "mlflow")),
    "rollback": ("ultrathink_model.promotion.rollback", ("pydantic", "yaml", "mlflow")),
    "doctor": ("ultrathink_model.doctor", ("pydantic", "yaml", "psutil", "packaging")),
}
PROFILES = ("auto", "tiny", "small", "medium", "large")


def make_parser() -> ArgumentParser:
    """The flags of run.py."""
    parser = ArgumentParser(prog="run.py", description=__doc__ or "", epilog=_describe_keys)
    workflows = "; ".join(f"{name}: {text}" for name, text in WORKFLOWS.items())
    parser.add_argument("--workflow", choices=WORKFLOWS, required=True, help=workflows)
    parser.add_argument(
        "--profile", choices=PROFILES, help="configs/train_<profile>.yaml; auto (the default) looks at the hardware"
    )
    parser.add_argument("--config", metavar="FILE", help="a config file in place of a profile's")
    parser.add_argument(
        "--override",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="section.key=value for all stages, or stage:section.key=value for one, as in rlhf:rlhf.ppo_epochs=2",
    )
    parser.add_argument("--output-dir", metavar="FOLDER", help="short for --override output.output_dir=FOLDER")
    parser.add_argument("--stack", metavar="NAME", help="ZenML stack to run on; the active one by default")
    parser.add_argument(
        "--run-settings", metavar="FILE", help="machines, images, retries of the steps; by default the stack's own file"
    )
    parser.add_argument("--schedule", metavar="CRON", help="run at these times, where the stack has schedules")
    return parser


def main() -> None:
    """Parses the command line and runs the workflow.

    Raises:
        UltrathinkError: A mistake of the user's, or a stop by a signal, anywhere in the run.
    """
    arguments = make_parser().parse_args()
    overrides = list(arguments.override)
    if arguments.output_dir:
        overrides.append(f"output.output_dir={arguments.output_dir}")
    from ultrathink_model.workflow import plan_workflow  # noqa: PLC0415 - after --help

    plan = plan_workflow(arguments.workflow, arguments.profile, arguments.config, overrides)
    print(f"{plan.workflow}: {plan.reason}. Starting ZenML…", flush=True)
    from pipelines.start import run_workflow  # noqa: PLC0415 - ZenML takes seconds to import

    run_workflow(
        plan,
        arguments.profile,
        arguments.config,
        overrides,
        arguments.stack,
        arguments.run_settings,
        arguments.schedule,
    )


def run_command(name: str, arguments: list[str]) -> None:
    """Runs a command other than a workflow; its module is imported only now."""
    importlib.import_module(COMMANDS[name][0]).main(arguments)


def _describe_keys() -> str:
    from ultrathink_model.config.describe import render_text  # noqa: PLC0415 - only for --help

    return render_text()


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        require_packages("run.py", COMMANDS[sys.argv[1]][1])
        run_and_exit(functools.partial(run_command, sys.argv[1], sys.argv[2:]))
    require_packages("run.py", ("pydantic", "yaml", "torch", "zenml", "mlflow", "datasets", "transformers"))
    run_and_exit(main)
