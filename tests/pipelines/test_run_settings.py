"""Run settings: every shipped file, what they become in ZenML's words, and what is refused."""

from pathlib import Path

import pytest

from pipelines.run_settings import FOLDER, RunSettings, find_run_settings, read_run_settings, to_zenml
from ultrathink_model.errors import ConfigError
from ultrathink_model.workflow import WORKFLOWS

STEPS = WORKFLOWS["production"].steps
FLAVORS = {
    "local": "local",
    "local_gpu": "local",
    "sagemaker": "sagemaker",
    "vertex": "vertex",
    "kubernetes": "kubernetes",
}

pytestmark = [
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]


def own(options, step, flavor):
    return options["steps"][step]["settings"][f"orchestrator.{flavor}"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_fit_their_stack_and_every_line_says_what_it_is(path):
    assert to_zenml(read_run_settings(path), FLAVORS[path.stem], STEPS) is not None
    assert find_run_settings(f"ultrathink_{path.stem}") == read_run_settings(path)
    stack = Path(FOLDER).parent / path.name
    assert stack.is_file()


def test_sagemaker_gets_machines_spot_and_timeouts():
    options = to_zenml(find_run_settings("sagemaker"), "sagemaker", STEPS)
    train = own(options, "baseline", "sagemaker")
    assert train["instance_type"] == "ml.g5.2xlarge"
    assert train["estimator_args"] == {"use_spot_instances": True, "max_wait": (120 + 24) * 3600}
    assert train["keep_alive_period_in_seconds"] is None
    assert own(options, "prepare_data", "sagemaker")["instance_type"] == "ml.m5.2xlarge"
    assert own(options, "evaluate_rlhf", "sagemaker")["max_runtime_in_seconds"] == 4 * 3600
    retry = options["steps"]["rlhf"]["retry"]
    assert (retry.max_retries, retry.delay, retry.backoff) == (2, 60, 2)
    assert options["settings"]["docker"].dockerfile.endswith("Dockerfile")


def test_vertex_gets_accelerators():
    options = to_zenml(find_run_settings("vertex"), "vertex", STEPS)
    job = own(options, "advanced", "vertex")["custom_job_parameters"]
    assert (job["machine_type"], job["accelerator_type"], job["accelerator_count"]) == (
        "g2-standard-12",
        "NVIDIA_L4",
        1,
    )
    assert job["additional_training_job_args"]["strategy"] == "SPOT"
    assert own(options, "export", "vertex")["custom_job_parameters"]["accelerator_count"] == 0


def test_kubernetes_gets_requests_limits_and_spot_nodes():
    settings = RunSettings.model_validate(
        {
            "steps": {
                "baseline": {"gpus": 2, "cpus": 8, "spot": True, "node_labels": {"pool": "spot"}, "timeout_hours": 1}
            }
        }
    )
    pod = own(to_zenml(settings, "kubernetes", STEPS), "baseline", "kubernetes")["pod_settings"]
    assert pod["resources"] == {"requests": {"cpu": "8"}, "limits": {"nvidia.com/gpu": "2"}}
    assert pod["node_selectors"] == {"pool": "spot"}
    assert pod["tolerations"][0]["value"] == "spot"
    assert pod["additional_pod_spec_args"] == {"active_deadline_seconds": 3600}


def test_a_ready_image_is_not_built():
    docker = to_zenml(RunSettings(image="registry/ultrathink:1"), "kubernetes", [])["settings"]["docker"]
    assert (docker.parent_image, docker.skip_build) == ("registry/ultrathink:1", True)


@pytest.mark.parametrize(
    ("text", "flavor", "message"),
    [
        ("steps: {baselin: {gpus: 1}}", "local", "did you mean baseline"),
        ("steps: {baseline: {gpu: 1}}", "local", "Did you mean gpus"),
        ("defaults: {retries: -1}", "local", "greater than or equal to 0"),
        ("environment: {HF_TOKEN: abc}", "vertex", "HF_TOKEN is a secret"),
        ("defaults: {gpus: 1}", "local", "takes the machine as it is"),
        ("defaults: {machine: p3.8xlarge}", "sagemaker", "named ml"),
        ("defaults: {machine: ml.p3.8xlarge, gpus: 1}", "sagemaker", "ml.p3.8xlarge has 4"),
        ("defaults: {machine: g2-standard-12, gpus: 1}", "vertex", "gpus and gpu_type together"),
        ("defaults: {spot: true}", "kubernetes", "node_labels"),
        ("defaults: {gpus: 1}", "airflow", "cannot be given to the orchestrator airflow"),
        ("a: [", "local", "is no YAML"),
    ],
)
def test_what_an_orchestrator_cannot_do_is_refused(text, flavor, message, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        to_zenml(read_run_settings(path), flavor, STEPS)


@pytest.mark.slow
def test_the_bare_command_takes_the_settings_of_its_stack_and_a_yaml_file_wins_over_them(
    workspace, tmp_path, monkeypatch
):
    import yaml
    from zenml.client import Client

    from pipelines.prototype import prototype_pipeline
    from pipelines.start import as_command

    stack = Client().active_stack_model.name
    (tmp_path / f"{stack.removeprefix('ultrathink_')}.yaml").write_text(
        "{defaults: {retries: 2}, steps: {export: {retries: 5}}}"
    )
    monkeypatch.setattr("pipelines.run_settings.FOLDER", tmp_path)
    file = {
        "parameters": {"config": "small.yaml", "overrides": ["output.output_dir=settled"]},
        "steps": {"report": {"retry": {"max_retries": 9}}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
    pipeline = as_command(prototype_pipeline.copy()).with_options(config_path=str(tmp_path / "run.yaml"))
    pipeline.prepare()  # another test of this process may have, with other settings
    snapshot = pipeline.create_snapshot("settled")
    retries = {name: step.config.retry.max_retries for name, step in snapshot.step_configurations.items()}
    assert retries.pop("export") == 5
    assert retries.pop("report") == 9
    assert set(retries.values()) == {2}
