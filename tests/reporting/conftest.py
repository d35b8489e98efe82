"""Run folders as training leaves them: a dense stage, one with experts and depths, and an aligned one."""

import json

import pytest
from stage_metrics import HOSTILE, training_rows

from ultrathink_model.config import override_config
from ultrathink_model.evaluation.result import EvaluationResult, ReadPiece, Sample
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity

PROMPT = "Fellow <b>citizens</b>"
PATHS = ("fast", "standard", "deep", "ultra_deep")


@pytest.fixture
def make_stage(tiny_config, tmp_path):
    """Makes a run folder that holds config, metrics and evaluation of a stage."""

    def make(name, rows, overrides=(), bits=1.6, text=HOSTILE, reading=()):
        folder = RunFolder(tmp_path / name)
        config = override_config(tiny_config, [f"output.output_dir={folder.path}", *overrides])
        folder.begin(RunIdentity.of(config, name), config)
        folder.set_status("finished")
        writer = MetricsWriter(folder.metrics_file)
        for step, row in enumerate(rows, start=1):
            writer.write(step, row)
        losses = {"validation": bits, "unigram": 2.17, "bigram": 1.49}
        EvaluationResult(
            metrics={
                f"eval/{task}/{measure}": value * scale
                for task, value in losses.items()
                for measure, scale in (("loss", 3.0), ("perplexity", 60.0), ("bits_per_byte", 1.0))
            },
            samples=[Sample(prompt=PROMPT, text=text)],
            reading=[ReadPiece(text=piece, passes=passes) for piece, passes in reading],
            data_fingerprint="f",
            validation_tokens=1000,
            validation_bytes=4380,
        ).save(folder.evaluation_file)
        return folder.path

    return make


@pytest.fixture
def stages(make_stage):
    """The folders of a whole production run."""
    base = make_stage("base", training_rows(8.3, 4.8))
    routed_rows = [
        row
        | {"train/moe/entropy": 2.5, "train/aux/moe/load_balance": 0.01, "train/dre/compute": 0.6}
        | {f"train/dre/path/{path}": share for path, share in zip(PATHS, (0.5, 0.35, 0.1, 0.05), strict=True)}
        for row in training_rows(4.8, 4.5)
    ]
    features = ["advanced.enable_moe=true", "advanced.enable_dre=true"]
    reading = [("The", 0.0), (" <b>state", 3.0), (" of", 0.5)]
    routed = make_stage("experts", routed_rows, features, bits=1.5, reading=reading)
    load = [[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.125] * 8]
    groups = {"knowledge": 4, "skill": 2, "meta": 1, "safety": 1}
    none = [None] * 4
    routing = {
        "moe/load": load,
        "groups": groups,
        "moe/group_share": [none, [0.4, 0.5, 0.05, 0.05], none, none],
        "dre/paths": [[0.5, 0.35, 0.1, 0.05]],
    }
    (routed / "routing.json").write_text(json.dumps(routing))
    aligned_rows = [
        {"rlhf/reward": 0.02 * step, "rlhf/kl": 0.1 * step, "rlhf/kl_weight": 0.05, "rlhf/reward_accuracy": 0.8}
        for step in range(1, 31)
    ]
    aligned = make_stage("aligned", aligned_rows, bits=1.51)
    pair = {"prompt": PROMPT, "before": HOSTILE, "after": "peace", "reward_before": -0.5, "reward_after": 0.7}
    (aligned / "samples.json").write_text(json.dumps([pair]))
    return [base, routed, aligned]
