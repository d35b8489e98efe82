"""The guide's commands, word for word, each followed by what makes it small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

TINY = (
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.vocab_size=300",
    "model.intermediate_size=64", "model.max_seq_length=32", "data.tokenizer_name=train", "data.train_samples=64",
    "training.max_steps=2", "training.batch_size=4", "training.warmup_steps=1", "evaluation.num_generations=0",
    "evaluation.eval_samples=8", "logging.use_mlflow=false", "training.global_batch_size=null",
    "training.gradient_accumulation_steps=1",
)  # fmt: skip


@pytest.fixture
def places(tmp_path):
    """Overrides that keep a run in the test's own folder."""
    return (f"output.output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'data'}")


@pytest.fixture
def wikitext(tmp_path):
    """A hub on this machine that has a data set of wikitext's name and shape: what an environment needs to see it."""
    folder = tmp_path / "hub" / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    for split, articles in (("train", 40), ("validation", 5)):
        lines = [line for n in range(articles) for line in ("", f" = {split} {n} = \n", "", f" text {n} of it \n" * 20)]
        pq.write_table(pa.table({"text": lines}), folder / f"{split}-00000.parquet")
    files = "".join(
        f"      - split: {split}\n        path: wikitext-2-raw-v1/{split}-*\n" for split in ("train", "validation")
    )
    card = f"---\nconfigs:\n  - config_name: wikitext-2-raw-v1\n    data_files:\n{files}---\n"
    (folder.parent / "README.md").write_text(card, encoding="utf-8")
    script = ROOT / "tests" / "data" / "hub_server.py"
    server = subprocess.Popen([sys.executable, script, tmp_path / "hub"], stdout=subprocess.PIPE, text=True)
    yield {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    server.kill()
    server.wait()
    server.stdout.close()


def run(line, *more, cwd=ROOT, environment=None):
    """Runs a command of the guide with more words after it; `python` and its programs are this environment's."""
    words = [*line.split(), *map(str, more)]
    done = subprocess.run(
        words,
        cwd=cwd,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_flags_alone(wikitext, tmp_path):
    line = (
        "python train_ultrathink.py --use_mlflow --dataset wikitext --hidden_size 512 --num_layers 6 --num_heads 8 "
        "--batch_size 4 --enable_moe --enable_dre"
    )
    small = ("--max_steps", 1, "--max_seq_length", 32, "--vocab_size", 512, "--tokenizer_name", "train")
    small += ("--expert_hidden_size", 32, "--num_generations", 0, "--eval_samples", 4, "--train_samples", 32)
    small += ("--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "data")
    small += ("--mlflow_tracking_uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    small += ("--mlflow_artifact_dir", tmp_path / "artifacts", "--no-system_metrics", "--warmup_steps", 0)
    run(line, *small, environment=wikitext)
    config = json.loads((tmp_path / "run" / "final_model" / "config.json").read_text(encoding="utf-8"))
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (512, 6, 8)
    assert len(losses(tmp_path / "run")) == 1
    assert (tmp_path / "mlflow.db").is_file()


def test_the_batch_file_as_a_python_script(places, tmp_path):
    run("python scripts/run_training.bat --profile small", "--override", "data.dataset=dummy", *TINY, *places)
    assert (tmp_path / "run" / "final_model" / "model.safetensors").is_file()


def test_deepspeed_with_a_hostfile(places, tmp_path):
    (tmp_path / "hostfile").write_text("localhost slots=2\n", encoding="utf-8")
    # The guide's line goes to each node by ssh; without ssh it is started on each, which is then told its number.
    line = (
        f"deepspeed --hostfile={tmp_path / 'hostfile'} --no_ssh --node_rank 0 --master_addr 127.0.0.1 "
        "train_advanced.py --config configs/train_large.yaml --override distributed.enabled=true "
        "distributed.launcher=deepspeed distributed.deepspeed_config=configs/deepspeed_z3.json"
    )
    off = ("advanced.enable_moe=false", "advanced.enable_dre=false", "advanced.enable_constitutional=false")
    off += ("advanced.enable_rlhf=false", "advanced.enable_multimodal=false", "training.compile=false")
    run(line, *TINY, *off, "data.dataset=dummy", *places, environment={"DS_ACCELERATOR": "cpu"})
    assert (tmp_path / "run" / "final_model" / "model.safetensors").is_file()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint_*.pt")
    assert json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["world_size"] == 2


def test_the_profile_of_a_run_by_python(places, tmp_path):
    """`torch.utils.bottleneck` of the guide is no more in torch 2.13; Python's own profiler tells the same."""
    output = run(
        "python -m cProfile -s cumtime train_advanced.py --config configs/train_small.yaml",
        *("--override", "data.dataset=dummy", *TINY, *places),
    )
    assert "cumtime" in output
    assert "trainer.py" in output


def test_dummy_data_and_samples(places, tmp_path):
    line = "python train_advanced.py --config configs/train_small.yaml --override data.dataset=dummy data.train_samples=1000"
    run(line, *(word for word in TINY if "train_samples" not in word), *places)
    assert len(losses(tmp_path / "run")) >= 1
