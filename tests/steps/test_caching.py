"""The code that a cached result depends on."""

import pytest

from steps import caching
from steps.caching import hash_code


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "data" / "__pycache__").mkdir(parents=True)
    (tmp_path / "data" / "pack.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "errors.py").write_text("y = 1\n", encoding="utf-8")
    monkeypatch.setattr(caching, "PACKAGE", tmp_path)
    return tmp_path


def test_the_hash_follows_content_and_names_but_not_byte_code(package):
    parts = ("errors.py", "data")
    before = hash_code(parts)
    (package / "data" / "__pycache__" / "pack.pyc").write_bytes(b"1")
    assert hash_code(parts) == before
    (package / "data" / "pack.py").rename(package / "data" / "packing.py")
    renamed = hash_code(parts)
    assert renamed != before
    (package / "data" / "packing.py").write_text("x = 2\n", encoding="utf-8")
    assert hash_code(parts) not in (before, renamed)


def test_every_part_of_the_code_exists():
    for name in (*caching.TRAINING_CODE, "alignment", "evaluation", "export", "reporting"):
        assert (caching.PACKAGE / name).exists(), name


def test_training_does_not_depend_on_the_report():
    assert "reporting" not in caching.TRAINING_CODE
    assert caching.training_code() != caching.alignment_code() != caching.evaluation_code()
