"""train_advanced.py and train_ultrathink.py as commands: what they write, and how they refuse bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

import train_advanced
import train_ultrathink
from ultrathink_model.command_line import run_and_exit
from ultrathink_model.config import load_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a text of 40 short documents and a cache for its prepared form."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"Chapter {n}: on the {n}th day the old ship sailed {n * n} miles to the east." for n in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def config_file(tiny_config, corpus, tmp_path):
    values = tiny_config.model_dump(mode="json")
    values["data"] |= {"dataset": str(corpus / "text.jsonl"), "cache_dir": str(corpus / "data")}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs an entry point in this process: its exit code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_and_exit(module.main)
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    yield run
    signal.signal(signal.SIGTERM, before)


def run_script(script, *arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


def test_a_run_leaves_exactly_the_folder_of_the_contract(call, config_file, tmp_path):
    code, out, _ = call(
        train_advanced,
        f"--config={config_file}",
        "--override",
        "training.checkpoint_steps=3",
        "evaluation.num_generations=1",
    )
    assert code == 0
    folder = tmp_path / "run"
    for name in ("config.yaml", "training.log", "metrics.jsonl", "report.html", "evaluation.json"):
        assert (folder / name).stat().st_size > 0, name
    assert {"checkpoint_00000003.pt", "checkpoint_00000006.pt"} <= {path.name for path in folder.iterdir()}
    assert (folder / "checkpoint_00000006.pt" / "manifest.json").is_file()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "ultrathink.yaml"):
        assert (folder / "final_model" / name).is_file(), name
    assert load_config(folder / "config.yaml").training.checkpoint_steps == 3
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["run_name"] == "small"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second", "tokens"} <= rows[-2].keys()
    assert rows[-1]["eval/validation/loss"] > 0
    for place in ("report.html", "final_model", "metrics.jsonl"):
        assert str(folder / place) in out


def test_the_same_command_again_trains_nothing_more(call, config_file, tmp_path):
    overrides = ["--override", "evaluation.num_generations=0", "training.max_steps=2"]
    assert call(train_advanced, "--config", config_file, *overrides)[0] == 0
    weights = (tmp_path / "run" / "final_model" / "model.safetensors").stat().st_mtime_ns
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert call(train_advanced, "--config", config_file, *overrides)[0] == 0
    assert (tmp_path / "run" / "final_model" / "model.safetensors").stat().st_mtime_ns == weights
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_init_from_starts_another_run_where_the_first_one_ended(call, config_file, tmp_path):
    overrides = ["--override", "evaluation.num_generations=0", "training.max_steps=2"]
    assert call(train_advanced, "--config", config_file, *overrides, "--run-name", "baseline")[0] == 0
    model = tmp_path / "run" / "final_model"
    arguments = ["--config", config_file, "--init-from", model, "--run-name", "advanced", *overrides]
    assert call(train_advanced, *arguments, "advanced.enable_moe=true", "advanced.enable_dre=true")[0] == 0
    assert (tmp_path / "run" / "previous" / "baseline" / "metrics.jsonl").is_file()
    assert load_config(model / "ultrathink.yaml").advanced.enable_moe


def test_flags_train_like_a_file(call, corpus, tmp_path):
    code, _, error = call(
        train_ultrathink,
        *("--dataset", corpus / "text.jsonl", "--tokenizer_name", "train", "--vocab_size", 300, "--hidden_size", 32),
        *(
            "--num_layers",
            2,
            "--num_heads",
            4,
            "--max_seq_length",
            32,
            "--batch_size",
            4,
            "--enable_moe",
            "--enable_dre",
        ),
        *("--num_knowledge_experts", 4, "--num_skill_experts", 2, "--num_meta_experts", 1, "--num_safety_experts", 1),
        *("--max_steps", 2, "--no-use_mlflow", "--evaluation_batch_size", 8, "--num_generations", 0),
        *("--output_dir", tmp_path / "run", "--cache_dir", corpus / "data"),
    )
    assert code == 0, error
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.training.batch_size, config.evaluation.batch_size, config.advanced.enable_moe) == (4, 8, True)
    assert not config.logging.use_mlflow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--override", "training.batch_sise=4"], "Did you mean training.batch_size?"),
        (["--override", "training.batch_size=four"], "training.batch_size='four' is refused"),
        (["--override", "data.dataset={folder}/missing.txt"], "missing.txt"),
        (["--override", "data.dataset={folder}/empty.txt"], "empty.txt"),
        (["--override", "data.dataset={folder}/latin1.txt"], "latin1.txt"),
        (["--override", "data.dataset=nobody/no-such-dataset"], "nobody/no-such-dataset"),
        (["--init-from", "{folder}/nowhere"], "nowhere"),
        (["--init-from", "{folder}"], "config.json"),
        (["--resume", "{folder}/checkpoint_00000009.pt"], "checkpoint_00000009.pt does not exist"),
        (["--profile", "tiny"], "not allowed with argument"),
        (["--batch-size", "4"], "unrecognized arguments: --batch-size"),
    ],
)
def test_bad_input_is_refused_with_a_message_and_leaves_nothing(
    arguments, message, call, config_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes("Der Müller mählt.\n".encode("latin-1") * 50)
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    arguments = ["--config", config_file, "--override", f"data.cache_dir={tmp_path / 'data'}", *arguments]
    code, _, error = call(train_advanced, *arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "final_model").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    folders = [path for path in (tmp_path / "data").glob("*") if path.is_dir()]
    assert all((path / "manifest.json").is_file() for path in folders), folders


def test_a_missing_config_file_is_refused(call):
    code, _, error = call(train_advanced, "--config", "nowhere.yaml")
    assert (code, error) == (
        2,
        "--config nowhere.yaml: No such file or directory. Shipped configs lie in configs/train_*.yaml.\n",
    )


def test_two_runs_do_not_share_a_folder(call, config_file, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        code, _, error = call(train_advanced, "--config", config_file)
    assert code == 2
    assert "another process trains there" in error


def test_an_unknown_flag_names_the_nearest_one(call):
    code, _, error = call(train_ultrathink, "--hiden_size", "5")
    assert code == 2
    assert "Did you mean --hidden_size?" in error


def test_every_key_of_the_config_is_one_flag():
    from ultrathink_model.config.load import valid_keys

    flags = [flag for action in train_ultrathink.make_parser()._actions for flag in action.option_strings]
    assert len(flags) == len(set(flags))
    destinations = {action.dest for action in train_ultrathink.make_parser()._actions}
    assert set(valid_keys()) <= destinations
    assert {"--batch_size", "--evaluation_batch_size", "--moe_layer_frequency", "--dre_layer_frequency"} <= set(flags)


@pytest.mark.parametrize("script", ["train_advanced.py", "train_ultrathink.py", "scripts/run_training.bat", "run.py"])
def test_help_lists_the_keys_and_imports_neither_torch_nor_zenml(script):
    done = run_script(script, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "hidden_size" in done.stdout
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "pydantic" in modules
    assert not modules & {"torch", "zenml", "transformers", "datasets", "mlflow"}


def test_a_python_without_the_packages_is_told_how_to_get_them():
    # -I -S: no site-packages, as in a Python that nothing was installed into.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "run.py"), "--workflow", "prototype"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "make setup" in done.stderr or ".venv/bin/python run.py" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_sigterm_saves_exits_75_and_the_same_command_goes_on(config_file, tmp_path):
    command = [sys.executable, str(ROOT / "train_advanced.py"), "--config", str(config_file)]
    # An epoch of this corpus is some ten steps; none of its ends is to validate and save.
    command += ["--override", "training.max_steps=400", "training.num_epochs=1000", "evaluation.eval_frequency=1000"]
    command += ["evaluation.num_generations=0", "evaluation.eval_samples=8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step 20/" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "start the same command again" in error
    assert "Traceback" not in error
    stopped_at = max(int(path.name[11:19]) for path in (tmp_path / "run").glob("checkpoint_*.pt"))
    assert 20 <= stopped_at < 400
    done = run_script("train_advanced.py", *command[2:])
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 401))


@pytest.mark.slow
def test_torchrun_trains_as_python_does(config_file, tmp_path):
    overrides = ["--override", "training.global_batch_size=4", "training.batch_size=2", "evaluation.num_generations=0"]
    one = ["--config", config_file, *overrides, f"output.output_dir={tmp_path / 'one'}"]
    assert run_script("train_advanced.py", *one).returncode == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        ROOT / "train_advanced.py",
    ]
    command += [
        "--config",
        config_file,
        *overrides,
        f"output.output_dir={tmp_path / 'two'}",
        "distributed.enabled=true",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    losses = [
        [
            row["train/loss"]
            for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "train/loss" in row
        ]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (tmp_path / "two" / "report.html").is_file()
