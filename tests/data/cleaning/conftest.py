"""Texts to clean, and their preparation as a user has it."""

import json

import pytest
from cleaned_texts import edit, read

from ultrathink_model.config import override_config
from ultrathink_model.data import prepare_data
from ultrathink_model.data.sotu import SotuSource


@pytest.fixture(scope="module")
def speeches():
    """The first 9,000 characters of thirty speeches, each of its own time."""
    return [str(row.text)[:9000] for row in SotuSource().rows("train")][::8]


@pytest.fixture
def prepare(tiny_config, tmp_path):
    """Prepares texts with some parts of cleaning on; gives the manifest and the texts that are left."""

    def run(texts, *overrides):
        file = tmp_path / "corpus.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        settings = [f"data.dataset={file}", "data.executor_workers=1", "data.max_quarantine_fraction=0.1", *overrides]
        manifest = prepare_data(override_config(tiny_config, settings))
        return manifest, [text for split in ("train", "validation") for text in read(manifest, split)]

    return run


@pytest.fixture
def copies(monkeypatch, speeches):
    """Texts with duplicates, in several tasks."""
    from ultrathink_model.data.cleaning import extract

    monkeypatch.setattr(extract, "TASK_CHARACTERS", 60_000)
    return [*speeches, speeches[3], edit(speeches[7], 0.05, 1)]
