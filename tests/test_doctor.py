"""`run.py doctor`: what is well, and what it says where something is not."""

import sqlite3

import pytest

from ultrathink_model import doctor
from ultrathink_model.config import override_config
from ultrathink_model.errors import DependencyError


@pytest.fixture(autouse=True)
def own_zenml(tmp_path, monkeypatch):
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))


def test_a_machine_that_is_set_up_is_well(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    doctor.main(["--profile", "tiny"])
    output = capsys.readouterr().out
    assert "BAD" not in output
    assert output.count("\n") >= len(doctor.CHECKS)


def test_what_is_bad_ends_with_the_number_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_text("this is no database, but long enough to be taken for one " * 99)
    with pytest.raises(DependencyError, match=rf"1 of {len(doctor.CHECKS)} checks"):
        doctor.main(["--profile", "tiny"])
    assert "BAD  MLflow's store mlflow.db is damaged: file is not a database" in capsys.readouterr().out


def test_a_run_that_fits_neither_memory_nor_disk_is_bad(tiny_config):
    huge = override_config(tiny_config, ["model.hidden_size=65536", "model.num_layers=400"])
    for check in (doctor.check_memory, doctor.check_disk):
        assert check(tiny_config).state == "good"
        found = check(huge)
        assert found.state == "bad"
        assert found.remedy


def test_missing_and_old_packages_are_named(tiny_config, monkeypatch):
    needed = ["numpy>=999", "no-such-package", "pyyaml>=6", "ruff; extra == 'dev'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: needed)
    found = doctor.check_packages(tiny_config)
    assert found.state == "bad"
    assert "numpy>=999, no-such-package" in found.text
    assert "pyyaml" not in found.text
    assert found.remedy == "make setup"


def test_a_server_that_is_down_is_named_with_its_reason(tiny_config):
    down = override_config(tiny_config, ["logging.use_mlflow=true", "logging.mlflow_tracking_uri=http://127.0.0.1:9"])
    found = doctor.check_mlflow(down)
    assert found.state == "bad"
    assert "refused" in found.text


def test_a_whole_store_is_good(tiny_config, tmp_path):
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (id)")
    stored = override_config(tiny_config, ["logging.use_mlflow=true", f"logging.mlflow_tracking_uri=sqlite:///{path}"])
    assert doctor.check_mlflow(stored).text.endswith("is whole")


def test_gpus_that_torch_does_not_see_are_bad(tiny_config, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_memory", lambda: [80.0, 80.0])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = doctor.check_gpus(tiny_config)
    assert found.state == "bad"
    assert "torch sees 0" in found.text
    assert "CUDA build" in found.remedy
