"""The shapes in the model's signatures are checked while tests run, and only then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from ultrathink_model.models.loss import chunked_cross_entropy
from ultrathink_model.models.transformer import Transformer


def test_sizes_that_do_not_agree_are_refused():
    hidden, weight = torch.zeros(2, 5, 8), torch.zeros(11, 8)
    with pytest.raises(TypeCheckError, match="labels"):
        chunked_cross_entropy(hidden, weight, torch.zeros(2, 4, dtype=torch.int64), 4)
    with pytest.raises(TypeCheckError, match="weight"):
        chunked_cross_entropy(hidden, torch.zeros(11, 9), torch.zeros(2, 5, dtype=torch.int64), 4)


def test_formats_that_do_not_fit_are_refused(small_model):
    model: Transformer = small_model()
    with pytest.raises(TypeCheckError, match="input_ids"):
        model(torch.zeros(2, 5))
    with pytest.raises(TypeCheckError, match="attention_mask"):
        model(torch.zeros(2, 5, dtype=torch.int64), attention_mask=torch.ones(2, 5))


def test_nothing_is_checked_outside_of_tests():
    program = "import sys, ultrathink_model.models.transformer; print('beartype' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_tests_that_compile_pass_where_nothing_is_checked():
    names = ("models/native/test_kernels.py", "models/test_transformer.py", "training/test_training_run.py")
    files = [Path(__file__).parents[1] / name for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "compiles", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"ULTRATHINK_CHECK_SHAPES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "12 passed" in done.stdout
