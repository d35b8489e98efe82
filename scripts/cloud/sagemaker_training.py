r"""Trains one run as a SageMaker job with the SageMaker SDK's PyTorch estimator, without ZenML.

    .venv/aws/bin/python scripts/cloud/sagemaker_training.py --role arn:aws:iam::123456789012:role/trainer \
        --bucket models --profile large --instance-type ml.p3.8xlarge --override data.dataset=wikitext

The job has the code of this folder, spot machines and its run's folder in S3; one that loses its machine goes on there.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from sagemaker import Session
from sagemaker.pytorch import PyTorch

from ultrathink_model.command_line import run_and_exit
from ultrathink_model.config import load_config, save_config

ROOT = Path(__file__).resolve().parents[2]
CODE = ("train_advanced.py", "ultrathink_model", "configs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
CONFIG_NAME = "job.yaml"
WORK = "/tmp/ultrathink"  # on the job's own disk; what lasts is in S3
HOUR = 3600


def make_parser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", required=True, help="the role that the job runs under")
    parser.add_argument("--bucket", required=True, help="where code and the run's folder go")
    parser.add_argument("--profile", default="large", help="tiny, small, medium or large")
    parser.add_argument("--run-name", default="sagemaker", help="name of the run and of its folder in S3")
    parser.add_argument("--instance-type", default="ml.p3.8xlarge")
    parser.add_argument(
        "--image", help="an image with the packages; by default AWS's own for PyTorch, which installs them"
    )
    parser.add_argument("--hours", type=float, default=72, help="the job is ended then")
    parser.add_argument("--on-demand", action="store_true", help="no spot machines")
    parser.add_argument("--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--wait", action="store_true", help="show the job's log until it ends")
    return parser


def make_estimator(given: argparse.Namespace, source: str) -> PyTorch:
    """The job; SageMaker hands hyperparameters to train_advanced.py as its flags."""
    seconds = int(given.hours * HOUR)
    image = {"image_uri": given.image} if given.image else {"framework_version": "2.6.0", "py_version": "py312"}
    spot = {} if given.on_demand else {"use_spot_instances": True, "max_wait": seconds + 24 * HOUR}
    return PyTorch(
        entry_point="train_advanced.py",
        source_dir=source,
        role=given.role,
        instance_type=given.instance_type,
        instance_count=1,
        volume_size=200,
        max_run=seconds,
        hyperparameters={"config": CONFIG_NAME, "run-name": given.run_name},
        environment={"PYTHONUNBUFFERED": "1"},
        sagemaker_session=Session(default_bucket=given.bucket),
        disable_profiler=True,
        **image,
        **spot,
    )


def gather_code(folder: Path, given: argparse.Namespace) -> None:
    """Puts what a job needs of this project into a folder, and the job's config.

    Raises:
        ConfigError: The profile or an override cannot be used.
    """
    for name in CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    overrides = [
        f"output.output_dir={WORK}/run",
        f"output.remote_dir=s3://{given.bucket}/runs/{given.run_name}",
        f"data.cache_dir={WORK}/data",
        "logging.use_mlflow=false",
    ]
    config = load_config(ROOT / "configs" / f"train_{given.profile}.yaml", [*overrides, *given.override])
    save_config(config, folder / CONFIG_NAME)
    (folder / "requirements.txt").write_text("-c constraints.txt\n.[deepspeed,cleaning]\ns3fs\n", encoding="utf-8")


def main() -> None:
    """Starts the job and names it."""
    given = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        gather_code(Path(name), given)
        estimator = make_estimator(given, name)
        estimator.fit(wait=given.wait)
    print(f"job {estimator.latest_training_job.name}; its run's folder: s3://{given.bucket}/runs/{given.run_name}")


if __name__ == "__main__":
    run_and_exit(main)
