"""The config in words: complete, and the page in docs/ up to date."""

from pathlib import Path

import pytest

from ultrathink_model.config.describe import describe_config, render_markdown, render_text
from ultrathink_model.config.load import valid_keys

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_configuration_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == render_markdown(), (
        "run `.venv/bin/python -m ultrathink_model.config.describe > docs/configuration.md`"
    )


@pytest.mark.parametrize("render", [render_markdown, render_text])
def test_every_key_is_described(render):
    text = render()
    for section in describe_config():
        for key in section.keys:
            assert (key.path if render is render_text else f"| `{key.name}` |") in text
    assert [key.path for section in describe_config() for key in section.keys] == valid_keys()


def test_every_description_is_a_sentence():
    for section in describe_config():
        for key in section.keys:
            assert key.description.endswith((".", "?")), key.path
            assert key.description[0].isupper() or key.description[0] == "`", key.path


@pytest.mark.parametrize(
    ("path", "type_name", "default"),
    [
        ("model.hidden_size", "int, ≥ 8", "512"),
        ("model.num_kv_heads", "int | null, ≥ 1", "null"),
        ("training.optimizer", "adamw | muon", "adamw"),
        ("advanced.enable_moe", "bool", "false"),
        ("data.mix_datasets", "str | list of DataSource | null", "null"),
        ("rlhf.clip_range", "float, > 0, < 1", "0.2"),
    ],
)
def test_types_and_bounds_are_spelled_out(path, type_name, default):
    found = {key.path: key for section in describe_config() for key in section.keys}[path]
    assert (found.type, found.default) == (type_name, default)


def test_the_entries_of_a_list_are_described_in_the_page():
    assert "| `expert_group` | knowledge \\| skill \\| meta \\| safety \\| null | `null` |" in render_markdown()


def test_no_table_row_is_broken_by_a_bar():
    rows = [line for line in render_markdown().splitlines() if line.startswith("| `")]
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5, row
