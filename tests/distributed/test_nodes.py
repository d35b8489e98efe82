"""Runs over several nodes: the shipped manifests, and their launch in two network namespaces of this machine."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "stack_configs" / "nodes"
MANIFEST = FOLDER / "kubernetes_torchrun.yaml"


def documents():
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}


def test_the_manifests_keys_are_those_of_the_kubernetes_clients_models():
    client = pytest.importorskip("kubernetes.client")

    def check(value, kind, place):
        if kind.startswith("list["):
            for number, entry in enumerate(value):
                check(entry, kind[5:-1], f"{place}[{number}]")
        elif hasattr(client, kind):
            model = getattr(client, kind)
            names = {model.attribute_map[name]: kinds for name, kinds in model.openapi_types.items()}
            for key, entry in value.items():
                assert key in names, f"{place}.{key}"
                check(entry, names[key], f"{place}.{key}")
        elif kind in ("str", "int", "bool"):
            assert type(value).__name__ == kind, f"{place} is {value!r}"

    found = documents()
    check(found["Service"], "V1Service", "Service")
    check(found["Job"], "V1Job", "Job")


def test_the_pods_find_the_first_one_by_the_services_name():
    found = documents()
    job, service = found["Job"]["spec"], found["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" or service["spec"]["clusterIP"] is None
    assert f"--master-addr={found['Job']['metadata']['name']}-0.{pod['subdomain']}" in container["args"]
    assert f"--master-port={service['spec']['ports'][0]['port']}" in container["args"]
    assert f"--nnodes={job['completions']}" in container["args"]
    assert job["completions"] == job["parallelism"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["args"]


def test_skypilot_starts_the_same_command_on_every_node():
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text(encoding="utf-8"))
    assert {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"} == task.keys()
    (container,) = documents()["Job"]["spec"]["template"]["spec"]["containers"]
    script = container["args"][container["args"].index("train_advanced.py") :]
    assert " ".join(script) in " ".join(task["run"].replace("\\\n", " ").split())


@pytest.fixture
def network():
    """Two network namespaces that are joined by a cable: their names and the first one's address."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = uuid.uuid4().hex[:6]
    names = [f"ut{tag}{number}" for number in (0, 1)]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add v{tag}0 netns {names[0]} type veth peer name v{tag}1 netns {names[1]}"]
    for number, name in enumerate(names):
        commands += [f"ip -n {name} addr add 10.77.0.{number + 1}/24 dev v{tag}{number}"]
        commands += [f"ip -n {name} link set v{tag}{number} up", f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield names, "10.77.0.1", f"v{tag}"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_torchrun_in_two_network_namespaces_trains_as_one_process_does(network, tiny_config, tmp_path):
    names, address, cable = network
    values = tiny_config.model_dump(mode="json")
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    overrides = ["--override", "training.global_batch_size=4", "training.batch_size=2", "evaluation.num_generations=0"]
    one = [sys.executable, "train_advanced.py", "--config", path, *overrides, f"output.output_dir={tmp_path / 'one'}"]
    done = subprocess.run(list(map(str, one)), cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr

    # The manifest's own arguments up to the script, with this machine's numbers in place of the cluster's.
    (container,) = documents()["Job"]["spec"]["template"]["spec"]["containers"]
    launch = container["args"][: container["args"].index("train_advanced.py") + 1]
    nodes = []
    for number, name in enumerate(names):
        words = [
            word.replace("=8", "=1")
            .replace("$(JOB_COMPLETION_INDEX)", str(number))
            .replace("ultrathink-0.ultrathink", address)
            for word in launch
        ]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *words, "--config", path]
        command += [*overrides, f"output.output_dir={tmp_path / 'two'}", "distributed.enabled=true"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"{cable}{number}", "TP_SOCKET_IFNAME": f"{cable}{number}"}
        nodes.append(
            subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )
        )  # fmt: skip
    for node in nodes:
        output, _ = node.communicate(timeout=500)
        assert node.returncode == 0, output
    losses = [
        [
            row["train/loss"]
            for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            if "train/loss" in row
        ]
        for name in ("one", "two")
    ]
    # As for two ranks on one machine: the sum over ranks rounds otherwise.
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
