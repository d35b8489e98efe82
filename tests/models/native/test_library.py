"""Compiling the C++, and taking it from the cache."""

import ctypes
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ultrathink_model.models.native import library as native
from ultrathink_model.models.native.library import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
TINY = 'extern "C" { int answer() { return 42; } void use_mkl(void *, void *) {} }'


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and sources that compile in no time."""
    source = tmp_path / "tiny.cpp"
    source.write_text(TINY)
    monkeypatch.setattr(native, "SOURCES", [source])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ultrathink-native"


def load() -> ctypes.CDLL | None:
    return native.library.__wrapped__()


@needs_compiler
def test_it_is_compiled_once_and_then_taken_from_the_cache(cache, monkeypatch):
    assert load().answer() == 42
    (built,) = cache.iterdir()
    assert (built.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o700, 0o700)
    # Whoever compiles now fails.
    monkeypatch.setattr(native.tempfile, "TemporaryDirectory", None)
    assert load().answer() == 42


@needs_compiler
@pytest.mark.parametrize("change", ["source", "flags", "processor"])
def test_whatever_it_follows_from_has_a_library_of_its_own(cache, change, monkeypatch):
    load()
    if change == "source":
        native.SOURCES[0].write_text(TINY.replace("42", "43"))
    elif change == "flags":
        monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-g"])
    else:
        monkeypatch.setattr(native, "_processor", lambda: "another")
    assert load().answer() == (43 if change == "source" else 42)
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_what_others_may_have_written_is_not_run(cache, caplog):
    load()
    (built,) = cache.iterdir()
    built.chmod(0o770)
    written = built.stat().st_mtime_ns
    assert load().answer() == 42
    assert built.stat().st_mtime_ns > written, "it is compiled again"
    cache.chmod(0o777)
    with caplog.at_level(logging.INFO):
        assert load().answer() == 42
    assert "for this process only" in caplog.text
    assert "chmod 700" in caplog.text
    assert len(list(cache.iterdir())) == 1


@needs_compiler
def test_processes_that_compile_at_once_do_not_meet(cache):
    program = (
        "from pathlib import Path; from ultrathink_model.models.native import library as native;"
        f"native.SOURCES = [Path({str(native.SOURCES[0])!r})]; print(native.library().answer())"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == ["42"] * 3
    assert len(list(cache.iterdir())) == 1


@needs_compiler
def test_a_file_that_was_cut_short_is_not_the_end_of_it(cache, caplog):
    cache.mkdir(mode=0o700, parents=True)
    built = cache / f"{native._fingerprint(find_compiler())}.so"
    built.touch(mode=0o700)
    with caplog.at_level(logging.INFO):
        assert load().answer() == 42
    assert "for this process only" in caplog.text


def test_without_a_compiler_there_is_none(cache, monkeypatch, caplog):
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    with caplog.at_level(logging.INFO):
        assert load() is None
    assert "take a C++ compiler" in caplog.text


@needs_compiler
def test_what_the_compiler_says_is_logged(cache, caplog):
    native.SOURCES[0].write_text("not C++")
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert "could not compile" in caplog.text
    assert "error" in caplog.text
    assert not list(cache.iterdir())


@needs_compiler
def test_a_folder_that_no_code_may_run_from_is_no_failure(cache, monkeypatch, caplog):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert "native kernels are off" in caplog.text


@needs_compiler
def test_without_a_home_it_is_compiled_for_the_process(cache, monkeypatch, caplog):
    blocked = cache.parents[1] / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with caplog.at_level(logging.INFO):
        assert load().answer() == 42
    assert "for this process only" in caplog.text
