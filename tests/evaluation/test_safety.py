import pytest
import torch
from sklearn.metrics import roc_auc_score

from ultrathink_model.config import override_config
from ultrathink_model.data import prepare_data
from ultrathink_model.evaluation.evaluate import evaluate_model
from ultrathink_model.evaluation.safety import roc_auc
from ultrathink_model.training.run import train


def test_auc_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 10, (200,), generator=generator) / 10  # with ties
    labels = torch.rand(200, generator=generator) < 0.3
    assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()), abs=1e-12)


def test_training_teaches_the_head_and_evaluation_measures_it(tiny_config):
    config = override_config(
        tiny_config,
        [
            "advanced.enable_constitutional=true",
            "constitutional.harm_token_fraction=1",
            "constitutional.harm_loss_weight=5",
            "training.max_steps=150",
            "training.learning_rate=3e-3",
            "evaluation.num_generations=0",
        ],
    )
    manifest = prepare_data(config)
    result = train(config, manifest=manifest, run_name="headed")
    assert result.metrics["train/aux/harm"] > 0
    metrics = evaluate_model(f"{result.output_dir}/final_model", manifest, config).metrics
    areas = [value for name, value in metrics.items() if name.startswith("eval/safety/auc_")]
    assert len(areas) == 10
    # Held-out topics share little but small words with the others, for a model of 300 byte pairs; chance is 0.5.
    assert sum(areas) / 10 > 0.55
    assert 0 <= metrics["eval/safety/false_alarms"] <= 1
