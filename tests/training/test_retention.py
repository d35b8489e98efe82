from pathlib import Path

from ultrathink_model.config.training import TrainingConfig
from ultrathink_model.training.checkpoint import CheckpointManifest, RunPosition
from ultrathink_model.training.retention import prune


def kept(folder: Path, figures: dict[int, dict[str, float]], **keys) -> list[int]:
    """Steps that remain of checkpoints with these figures."""
    for step, metrics in figures.items():
        checkpoint = folder / f"checkpoint_{step:08d}.pt"
        checkpoint.mkdir(exist_ok=True)
        manifest = CheckpointManifest(
            position=RunPosition(step=step),
            config_hash="c",
            config={},
            tokenizer_hash="t",
            data_fingerprint="d",
            strategy="single",
            world_size=1,
            global_batch=4,
            metrics=metrics,
        )
        (checkpoint / "manifest.json").write_text(manifest.sealed().model_dump_json())
    folders = [(int(path.name[11:19]), path) for path in folder.glob("checkpoint_*.pt")]
    prune(folders, TrainingConfig(**keys))
    return sorted(int(path.name[11:19]) for path in folder.glob("checkpoint_*.pt"))


FIGURES = {
    10: {"val/loss": 3.0, "train/loss": 1.0},
    20: {"val/loss": 1.0, "train/loss": 3.0},
    30: {"val/loss": 2.0},
    40: {},
    50: {"val/loss": 4.0, "train/loss": 2.0},
}


def test_the_newest_stay(tmp_path):
    assert kept(tmp_path, FIGURES, keep_checkpoints=2) == [40, 50]


def test_the_best_by_validation_stay_beside_the_newest(tmp_path):
    assert kept(tmp_path, FIGURES, keep_checkpoints=1, keep_best=2) == [20, 30, 50]


def test_the_best_by_another_metric_stay(tmp_path):
    assert kept(tmp_path, FIGURES, keep_checkpoints=1, keep_best=1, best_metric="train/loss") == [10, 50]


def test_every_nth_stays_for_good(tmp_path):
    assert kept(tmp_path, FIGURES, keep_checkpoints=1, keep_every=20) == [20, 40, 50]


def test_a_checkpoint_that_cannot_be_read_is_no_best_one_and_stops_nothing(tmp_path):
    kept(tmp_path, FIGURES, keep_checkpoints=9)
    (tmp_path / "checkpoint_00000020.pt" / "manifest.json").write_text("{")
    assert kept(tmp_path, {}, keep_checkpoints=1, keep_best=1) == [30, 50]


def test_a_run_keeps_its_best_validation(train_tiny, tmp_path):
    _, rows = train_tiny(
        "training.checkpoint_steps=1",
        "evaluation.eval_steps=2",
        "training.keep_checkpoints=1",
        "training.keep_best=1",
        "training.learning_rate=0.1",
        "evaluation.eval_samples=null",
    )
    figures = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    best = min(figures, key=lambda step: figures[step])
    steps = {int(path.name[11:19]) for path in (tmp_path / "run").glob("checkpoint_*.pt")}
    assert steps == {int(best), 6}
