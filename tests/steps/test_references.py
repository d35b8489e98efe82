"""References: they hold as long as what they refer to is there, unchanged."""

import json
import shutil

import pytest

from steps.references import Reference, StageReference, hash_files

FILES = ("config.yaml", "final_model")


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "final_model").mkdir(parents=True)
    (folder / "config.yaml").write_text("a: 1\n", encoding="utf-8")
    (folder / "final_model" / "model.safetensors").write_bytes(b"\0" * 3_000_000)
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    return folder


@pytest.fixture
def reference(run_folder):
    return Reference(uri=str(run_folder), files=FILES, sha256=hash_files(run_folder, FILES))


def test_an_untouched_result_is_intact(reference, run_folder):
    (run_folder / "metrics.jsonl").write_text("more\n", encoding="utf-8")
    assert reference.is_intact()


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda folder: shutil.rmtree(folder / "final_model"),
        lambda folder: (folder / "config.yaml").unlink(),
        lambda folder: (folder / "config.yaml").write_text("a: 2\n", encoding="utf-8"),
        lambda folder: (folder / "final_model" / "extra.json").write_text("{}", encoding="utf-8"),
        lambda folder: (folder / "final_model" / "model.safetensors").rename(folder / "final_model" / "other"),
    ],
    ids=["folder gone", "model gone", "file gone", "content", "one more file", "renamed"],
)
def test_a_result_that_is_gone_or_changed_is_not_intact(damage, reference, run_folder):
    damage(run_folder)
    assert not reference.is_intact()


def test_a_result_on_remote_storage_counts_as_intact():
    assert Reference(uri="s3://bucket/run", files=FILES, sha256="x").is_intact()


def test_references_survive_json(run_folder):
    stage = StageReference(
        uri=str(run_folder),
        files=FILES,
        sha256="x",
        name="baseline",
        step=3,
        tokens=5,
        started_at=1.5,
        mlflow_run_id=None,
    )
    assert StageReference.model_validate(json.loads(json.dumps(stage.model_dump(mode="json")))) == stage
