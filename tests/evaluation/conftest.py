"""A small corpus of real sentences, prepared."""

import pytest

from ultrathink_model.config import override_config
from ultrathink_model.data.prepare import prepare_data

SENTENCES = (
    "The state of the union is strong.",
    "We shall pay our debts, and we shall keep the peace!",
    "Has the Congress considered the report of the Treasury?",
    "No nation was ever ruined by trade.",
    "The people ask for roads, schools and honest courts.",
)


@pytest.fixture
def text_config(tiny_config, tmp_path):
    """A tiny config on 40 short documents, of which every fourth is held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        words = [SENTENCES[(number * step + step) % len(SENTENCES)] for step in range(1, 6)]
        (folder / f"{number:02d}.txt").write_text(f"{' '.join(words)} Document {number}.\n", encoding="utf-8")
    return override_config(
        tiny_config, [f"data.dataset={folder}", "data.validation_every=4", "evaluation.generation_tokens=8"]
    )


@pytest.fixture
def manifest(text_config):
    return prepare_data(text_config)
