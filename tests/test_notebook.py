"""colab_training.ipynb, executed from top to bottom on a CPU with a tiny run, and once more as after a lost session."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = (
    "training.max_steps=6 training.checkpoint_steps=2 model.num_layers=2 model.max_seq_length=64 data.train_samples=64 "
    "evaluation.eval_samples=8 evaluation.num_generations=0 logging.log_steps=1 training.warmup_steps=1"
)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Executes the notebook in a kernel of its own: the text that each code cell printed, and whether it drew."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs: make docs")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs: make docs")
    pytest.importorskip("ipykernel", reason="needs the extra docs: make docs")
    monkeypatch.setenv("ULTRATHINK_KEPT", str(tmp_path / "kept"))
    monkeypatch.setenv("ULTRATHINK_PROFILE", "tiny")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # streamlit sets it where it is imported, and no picture is drawn

    def run(overrides):
        monkeypatch.setenv("ULTRATHINK_OVERRIDES", overrides)
        notebook = nbformat.read(ROOT / "colab_training.ipynb", as_version=4)
        nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
        texts, images = [], 0
        for cell in notebook.cells:
            outputs = cell.get("outputs", [])
            texts.append("".join(output.get("text", "") for output in outputs))
            images += sum("image/png" in output.get("data", {}) for output in outputs)
        return texts, images

    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_notebook_trains_shows_and_speaks_and_a_second_session_goes_on(execute, tmp_path):
    texts, images = execute(OVERRIDES)
    whole = "\n".join(texts)
    assert f"runs are kept in {tmp_path / 'kept'}" in whole
    assert f"the code is in {ROOT}" in whole
    assert "profile tiny" in whole
    assert "step 6/6" in whole
    assert images == 1
    assert "training loss " in whole
    spoken = next(text for text in texts if "you:   The state of the union" in text)
    answers = [line.removeprefix("model:").strip() for line in spoken.splitlines() if line.startswith("model:")]
    assert len(answers) == 2
    assert all(answers)
    # The session is lost after step 4: the last checkpoint and the result are not there yet.
    import shutil

    run = tmp_path / "kept" / "tiny"
    shutil.rmtree(run / "checkpoint_00000006.pt")
    (run / "result.json").unlink()
    texts, _ = execute(OVERRIDES)
    assert "goes on after step 4" in "\n".join(texts)


def test_the_notebook_is_kept_without_outputs():
    import json

    notebook = json.loads((ROOT / "colab_training.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
