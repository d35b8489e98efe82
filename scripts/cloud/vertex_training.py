r"""Trains one run as a Vertex AI custom job, without ZenML.

    .venv/gcp/bin/python scripts/cloud/vertex_training.py --project my-project --location europe-west4 --bucket models \
        --image europe-west4-docker.pkg.dev/my-project/images/ultrathink:cuda --profile large \
        --machine-type n1-highmem-16 --accelerator NVIDIA_TESLA_V100 --accelerators 4

The image is the Dockerfile's. The run's folder is kept in the bucket; a job that loses its spot machine goes on there.
"""

import argparse
from typing import Any

from google.cloud import aiplatform

HOUR = 3600


def make_parser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", required=True)
    parser.add_argument("--location", required=True, help="as europe-west4")
    parser.add_argument("--bucket", required=True, help="where the run's folder goes")
    parser.add_argument(
        "--image", required=True, help="the image of the Dockerfile, in a registry that the job reaches"
    )
    parser.add_argument("--service-account", help="the account that the job runs under")
    parser.add_argument("--profile", default="large", help="tiny, small, medium or large")
    parser.add_argument("--run-name", default="vertex", help="name of the run and of its folder in the bucket")
    parser.add_argument("--machine-type", default="n1-highmem-16")
    parser.add_argument("--accelerator", default="NVIDIA_TESLA_V100", help="'' for none")
    parser.add_argument("--accelerators", type=int, default=4, help="one rank is started on each")
    parser.add_argument("--hours", type=float, default=72, help="the job is ended then")
    parser.add_argument("--on-demand", action="store_true", help="no spot machines")
    parser.add_argument("--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    return parser


def make_command(given: argparse.Namespace) -> list[str]:
    """What the container runs."""
    overrides = [
        "output.output_dir=/tmp/run",
        f"output.remote_dir=gs://{given.bucket}/runs/{given.run_name}",
        "data.cache_dir=/tmp/data",
        "logging.use_mlflow=false",
    ]
    if given.accelerators > 1:
        overrides.append("distributed.enabled=true")
    command = ["python", "train_advanced.py", "--config", f"configs/train_{given.profile}.yaml"]
    return [*command, "--run-name", given.run_name, "--override", *overrides, *given.override]


def make_worker_pools(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One machine with its accelerators."""
    machine: dict[str, Any] = {"machine_type": given.machine_type}
    if given.accelerator:
        machine |= {"accelerator_type": given.accelerator, "accelerator_count": given.accelerators}
    command = make_command(given)
    return [
        {
            "machine_spec": machine,
            "replica_count": 1,
            "disk_spec": {"boot_disk_type": "pd-ssd", "boot_disk_size_gb": 200},
            "container_spec": {"image_uri": given.image, "command": command[:2], "args": command[2:]},
        }
    ]


def main() -> None:
    """Starts the job and names it."""
    given = make_parser().parse_args()
    aiplatform.init(project=given.project, location=given.location, staging_bucket=f"gs://{given.bucket}")
    job = aiplatform.CustomJob(display_name=given.run_name, worker_pool_specs=make_worker_pools(given))
    strategy = aiplatform.gapic.Scheduling.Strategy
    job.submit(
        service_account=given.service_account,
        timeout=int(given.hours * HOUR),
        restart_job_on_worker_restart=True,
        scheduling_strategy=strategy.STANDARD if given.on_demand else strategy.SPOT,
    )
    print(f"job {job.resource_name}; its run's folder: gs://{given.bucket}/runs/{given.run_name}")


if __name__ == "__main__":
    main()
