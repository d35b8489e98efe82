import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from ultrathink_model.config import override_config
from ultrathink_model.config.model import HARM_CATEGORIES
from ultrathink_model.data import prepare_data
from ultrathink_model.evaluation.evaluate import evaluate_model
from ultrathink_model.evaluation.safety import roc_auc
from ultrathink_model.training.run import train


def test_auc_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 10, (200,), generator=generator) / 10  # with ties
    labels = torch.rand(200, generator=generator) < 0.3
    assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()), abs=1e-12)


def test_training_teaches_the_head_and_evaluation_measures_it(tiny_config, tmp_path):
    # Each category has a word of its own, at another place in every text.
    rows = []
    for number in range(240):
        category = HARM_CATEGORIES[number % 12] if number % 12 < 10 else None
        words = [f"w{(number * 7 + place) % 50}" for place in range(3)]
        words.insert(number % 4, category or "kind")
        rows.append(json.dumps({"text": " ".join(words), "labels": [category] if category else []}))
    (tmp_path / "safety.jsonl").write_text("\n".join(rows))
    config = override_config(
        tiny_config,
        [
            "advanced.enable_constitutional=true",
            f"constitutional.safety_data={tmp_path / 'safety.jsonl'}",
            "constitutional.harm_token_fraction=1",
            "constitutional.harm_loss_weight=5",
            "training.max_steps=150",
            "training.learning_rate=1e-2",
            "evaluation.num_generations=0",
        ],
    )
    manifest = prepare_data(config)
    result = train(config, manifest=manifest, run_name="headed")
    assert result.metrics["train/aux/harm"] > 0
    metrics = evaluate_model(Path(result.final_model), manifest, config).metrics
    areas = {name: value for name, value in metrics.items() if name.startswith("eval/safety/auc_")}
    assert len(areas) == 10
    # Chance is 0.5.
    assert sum(areas.values()) / 10 > 0.8, areas
    assert metrics["eval/safety/caught"] > metrics["eval/safety/false_alarms"]
