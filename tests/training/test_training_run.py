import json
import math
from pathlib import Path

import pytest
import torch
from conftest import losses
from torch.nn import functional as F

from ultrathink_model.config import load_config, override_config
from ultrathink_model.data import TrainLoader, ValidationLoader, prepare_data
from ultrathink_model.errors import CheckpointError, DependencyError
from ultrathink_model.models.hf import load_model
from ultrathink_model.models.native.kernels import use_native_kernels
from ultrathink_model.models.native.library import find_compiler
from ultrathink_model.models.transformer import build_model
from ultrathink_model.training import assembly, loss_scaler
from ultrathink_model.training.guard import TrainingDivergedError
from ultrathink_model.training.result import load_result
from ultrathink_model.training.run import train


def test_train_loss_is_the_mean_cross_entropy_of_the_steps_batch(train_tiny, manifest):
    result, rows = train_tiny("training.max_steps=1", "training.gradient_accumulation_steps=3")
    config = load_config(f"{result.output_dir}/config.yaml")
    model = build_model(config)
    batches = next(iter(TrainLoader(manifest, config)))
    with torch.no_grad():
        total = sum(
            F.cross_entropy(
                model(b.input_ids, document_ids=b.document_ids).logits.flatten(0, 1),
                b.labels.flatten(),
                reduction="sum",
            )
            for b in batches
        )
    tokens = sum(int((b.labels != -100).sum()) for b in batches)
    assert len(batches) == 3
    assert rows[0]["tokens"] == tokens == result.tokens
    # Two orders of summation in fp32.
    assert rows[0]["train/loss"] == pytest.approx(float(total) / tokens, abs=2e-6)


def test_final_val_loss_is_that_of_the_final_model_on_the_whole_split(train_tiny, manifest):
    result, rows = train_tiny()
    config = load_config(f"{result.output_dir}/config.yaml")
    model = load_model(result.final_model).eval()
    nats = tokens = 0.0
    with torch.no_grad():
        for batch in ValidationLoader(manifest, config):
            nats += float(model(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids).loss_sum)
            tokens += batch.num_tokens
    assert tokens == manifest.splits["validation"].tokens
    assert rows[-1]["val/loss"] == result.metrics["val/loss"] == pytest.approx(nats / tokens, abs=1e-5)


def test_cutting_the_global_batch_into_micro_batches_changes_no_loss(train_tiny):
    curves = [
        losses(
            train_tiny(
                f"training.batch_size={size}", f"training.gradient_accumulation_steps={count}", folder=str(size)
            )[1]
        )
        for size, count in ((8, 1), (4, 2), (2, 4))
    ]
    # fp32 sums in another order; six steps of AdamW at this rate keep that within the design's 1e-6.
    assert curves[1] == pytest.approx(curves[0], abs=1e-6)
    assert curves[2] == pytest.approx(curves[0], abs=1e-6)


def test_global_batch_size_sets_the_accumulation(train_tiny):
    whole = losses(train_tiny("training.batch_size=8", folder="whole")[1])
    parts = losses(train_tiny("training.batch_size=2", "training.global_batch_size=8", folder="parts")[1])
    assert parts == pytest.approx(whole, abs=1e-6)


def test_a_line_holds_the_contracts_metrics(train_tiny):
    result, rows = train_tiny("logging.log_steps=4")
    assert [row["step"] for row in rows] == [1, 4, 6]
    for row in rows:
        assert row.keys() >= {
            "step", "tokens", "train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second",
            "train/step_seconds", "train/bad_steps",
        }  # fmt: skip
    assert "val/loss" in rows[-1]
    assert result.metrics["train/loss"] == rows[-1]["train/loss"]
    assert result == load_result(Path(result.output_dir))


def test_the_run_folder_holds_what_the_contract_says(train_tiny, tmp_path):
    train_tiny()
    run = tmp_path / "run"
    names = {entry.name for entry in run.iterdir()}
    assert names >= {
        "config.yaml",
        "training.log",
        "metrics.jsonl",
        "checkpoint_00000006.pt",
        "final_model",
        "result.json",
    }
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert "wrote" in (run / "training.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (("training.max_steps=3",), 3),
        # 4 sequences a step: 10 samples are 2.5 steps an epoch, and the run ends with the step that holds the end.
        (("training.max_steps=null", "data.train_samples=10"), 3),
        (("training.max_steps=null", "data.train_samples=10", "training.num_epochs=2"), 5),
        (("training.max_steps=null", "training.max_tokens=300"), 3),
        (("training.max_steps=3", "training.max_tokens=600", "training.num_epochs=9"), 3),
    ],
)
def test_each_bound_ends_the_run_and_the_first_one_counts(train_tiny, overrides, steps):
    result, rows = train_tiny(*overrides)
    assert result.steps == rows[-1]["step"] == steps
    assert "val/loss" in rows[-1]
    assert rows[-1]["train/learning_rate"] == pytest.approx(1e-3)  # the schedule ends with the run


def test_max_seconds_ends_the_run(train_tiny):
    result, rows = train_tiny("training.max_steps=1000", "training.max_seconds=0.5")
    assert 0 < result.steps < 1000
    assert "val/loss" in rows[-1]
    assert result.final_model


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(train_tiny, tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"3 steps in a row up to step \d+ .*max_bad_steps=2"):
        train_tiny(
            "training.learning_rate=1.0e+38",
            "training.warmup_steps=0",
            "training.max_bad_steps=2",
            "training.max_steps=50",
            "training.weight_decay=0",
        )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["train/bad_steps"] for row in rows) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_fp16_skips_overflows_of_its_scale_and_then_learns(train_tiny, monkeypatch):
    monkeypatch.setattr(loss_scaler, "FIRST_SCALE", 2.0**30)
    fp16 = ("training.use_amp=true", "training.amp_dtype=fp16")
    _, rows = train_tiny("training.max_steps=40", "training.max_bad_steps=30", *fp16)
    assert rows[4]["train/bad_steps"] == 5  # the first ones, until the scale fits
    assert rows[-1]["train/bad_steps"] < 20
    assert losses(rows)[-1] < losses(rows)[0] - 0.8


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_fp16_follows_fp32_closely(train_tiny, monkeypatch):
    monkeypatch.setattr(loss_scaler, "FIRST_SCALE", 2.0**10)
    plain = losses(train_tiny(folder="plain")[1])
    mixed = losses(train_tiny("training.use_amp=true", "training.amp_dtype=fp16", folder="mixed")[1])
    assert mixed != plain
    # 11 bits of mantissa: about 0.05 % a product, of losses near 5.7.
    assert mixed == pytest.approx(plain, abs=0.01)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_bf16_follows_fp32_closely(train_tiny):
    plain = losses(train_tiny(folder="plain")[1])
    mixed = losses(train_tiny("training.use_amp=true", folder="mixed")[1])
    assert mixed != plain
    # 8 bits of mantissa: about 0.4 % a product, of losses near 5.7.
    assert mixed == pytest.approx(plain, abs=0.05)


def test_validation_comes_by_steps_epochs_and_at_the_end(train_tiny):
    def validated(*overrides: str) -> list[float]:
        rows = train_tiny(
            "training.max_steps=null",
            "data.train_samples=12",
            "training.num_epochs=4",
            "training.resume=never",
            *overrides,
        )[1]
        return [row["step"] for row in rows if "val/loss" in row]

    assert validated() == [3, 6, 9, 12]
    assert validated("evaluation.eval_frequency=2") == [6, 12]
    assert validated("evaluation.eval_frequency=9", "evaluation.eval_steps=5") == [5, 10, 12]


def test_eval_samples_bound_the_validations_on_the_way_only(train_tiny):
    few = train_tiny("evaluation.eval_steps=3", "evaluation.eval_samples=2", folder="few")[1]
    many = train_tiny("evaluation.eval_steps=3", "evaluation.eval_samples=8", folder="many")[1]
    assert few[2]["val/loss"] != many[2]["val/loss"]
    assert few[-1]["val/loss"] == many[-1]["val/loss"]


def test_checkpoints_come_by_steps_or_epochs_and_the_newest_are_kept(train_tiny, tmp_path):
    def saved(*overrides: str) -> list[int]:
        train_tiny(
            "training.max_steps=null",
            "data.train_samples=12",
            "training.num_epochs=4",
            "training.resume=never",
            *overrides,
        )
        return sorted(int(path.name[11:19]) for path in (tmp_path / "run").glob("checkpoint_*.pt"))

    assert saved() == [9, 12]
    assert saved("training.keep_checkpoints=9") == [3, 6, 9, 12]
    assert saved("training.keep_checkpoints=9", "training.checkpoint_steps=5") == [3, 5, 6, 9, 10, 12]
    assert saved("training.keep_checkpoints=9", "training.checkpoint_steps=5", "evaluation.eval_frequency=9") == [
        5,
        10,
        12,
    ]


def test_a_run_from_a_model_begins_where_that_model_ended(train_tiny):
    first, _ = train_tiny("training.max_steps=12", folder="first")
    _, rows = train_tiny(folder="second", init_from=Path(first.final_model))
    assert rows[0]["step"] == 0
    assert rows[0]["val/loss"] == pytest.approx(first.metrics["val/loss"], abs=1e-5)
    assert rows[0]["val/loss"] > rows[-1]["val/loss"]


def test_features_are_added_without_a_change_of_the_first_loss(train_tiny):
    source, _ = train_tiny("training.max_steps=12", folder="source")
    first = {}
    features = {
        "dense": [],
        "experts": ["advanced.enable_moe=true"],
        "depth": ["advanced.enable_dre=true", "advanced.dre_warmup_steps=4"],
        "both": ["advanced.enable_moe=true", "advanced.enable_dre=true", "advanced.dre_warmup_steps=4"],
    }
    for name, overrides in features.items():
        arguments = ("training.max_steps=1", "training.seed=3", *overrides)
        _, rows = train_tiny(*arguments, folder=name, init_from=Path(source.final_model))
        first[name] = rows[0]["val/loss"], losses(rows)[0]
    for name in features:
        assert first[name] == pytest.approx(first["dense"], abs=1e-5)


def test_a_model_of_another_tokenizer_is_no_start(train_tiny, base_config, tmp_path):
    first, _ = train_tiny("training.max_steps=1")
    (tmp_path / "other.txt").write_text("\n\n".join(f"Zebras graze {number} xylophones." for number in range(400)))
    config = override_config(
        base_config,
        [
            f"data.dataset={tmp_path / 'other.txt'}",
            "data.validation_every=2",
            f"output.output_dir={tmp_path / 'second'}",
        ],
    )
    with pytest.raises(CheckpointError, match=r"another tokenizer.*Set data\.tokenizer_name="):
        train(config, manifest=prepare_data(config), run_name="second", init_from=Path(first.final_model))


def test_experts_and_depth_report_their_routing(train_tiny, tmp_path):
    _, rows = train_tiny("advanced.enable_moe=true", "advanced.enable_dre=true", "moe.layer_frequency=2")
    assert rows[-1].keys() >= {
        "train/aux/moe/load_balance", "train/aux/moe/router_z", "train/moe/entropy", "train/moe/dropped",
        "train/moe/max_load", "train/moe/min_load", "train/dre/compute", "train/dre/path/fast", "train/dre/path/ultra_deep",
    }  # fmt: skip
    assert rows[-1]["train/moe/min_load"] <= 1 <= rows[-1]["train/moe/max_load"]
    tables = json.loads((tmp_path / "run" / "routing.json").read_text())
    assert [len(row) for row in tables["moe/load"]] == [8]
    assert sum(tables["moe/load"][0]) == pytest.approx(1)
    assert tables["groups"] == {"knowledge": 4, "skill": 2, "meta": 1, "safety": 1}
    assert math.isclose(
        sum(rows[-1][f"train/dre/path/{path}"] for path in ("fast", "standard", "deep", "ultra_deep")), 1, abs_tol=1e-6
    )


def test_kernels_are_native_unless_the_config_says_otherwise(train_tiny, monkeypatch):
    native = []
    monkeypatch.setattr(
        assembly, "use_native_kernels", lambda model, **how: native.append(use_native_kernels(model, **how))
    )
    overrides = ("advanced.enable_moe=true", "training.batch_size=8", "model.head_dim=16")
    runs = {
        value: losses(train_tiny(*overrides, f"training.native_kernels={value}", folder=value)[1])
        for value in ("true", "false")
    }
    assert native == [find_compiler() is not None]
    assert runs["true"] == pytest.approx(runs["false"], abs=1e-5)


def test_compiling_without_a_compiler_is_refused(train_tiny, monkeypatch):
    monkeypatch.setattr(assembly, "find_compiler", lambda: None)
    with pytest.raises(DependencyError, match=r"training\.compile=true needs a C\+\+ compiler"):
        train_tiny("training.compile=true")


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore")  # torch's compiler trips over its own deprecations
@pytest.mark.parametrize("experts", ["false", "true"])
def test_compiled_blocks_give_the_eager_losses(train_tiny, experts):
    overrides = [f"advanced.enable_moe={experts}"]
    eager = losses(train_tiny(*overrides, "training.native_kernels=false", folder="eager")[1])
    compiled = losses(train_tiny(*overrides, "training.compile=true", folder="compiled")[1])
    # Fused kernels round in other places.
    assert compiled == pytest.approx(eager, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_a_tracked_run_is_whole_in_mlflow(train_tiny, tmp_path):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking = (f"logging.mlflow_tracking_uri={store}", f"logging.mlflow_artifact_dir={tmp_path / 'artifacts'}")
    result, rows = train_tiny("logging.use_mlflow=true", *tracking)
    client = MlflowClient(store)
    run = client.get_run(result.mlflow_run_id)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(result.mlflow_run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(row["step"], row["train/loss"]) for row in rows]
    assert run.data.metrics["val/loss"] == result.metrics["val/loss"]
    assert run.data.params["training.max_steps"] == "6"


def test_an_unhealthy_gradient_is_named_once_in_the_log(train_tiny, tmp_path):
    train_tiny("training.z_loss_weight=1000", "training.gradient_clipping=1.0e-9")
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.count("step 1: the gradient's norm is") == 1
    assert log.count("healthy training keeps between 0.1 and 10") == 1
