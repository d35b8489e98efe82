"""The documents: every command in them is one that the command lines take, links lead somewhere, the site builds."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Programs of others that the environment has, by their name.
PROGRAMS = {"mlflow", "zenml", "torchrun", "source", "echo", "cp", "deepspeed", "export"}


def commands():
    """Every command line in a document's bash blocks, less those that say what they need."""
    found = []
    for document in DOCUMENTS:
        for block in BLOCK.findall(document.read_text(encoding="utf-8")):
            needs = False
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if line.lstrip().startswith("#"):
                    needs = line.lstrip().startswith("# needs ")
                elif line.strip() and not needs:
                    found.append(pytest.param(line.strip(), id=f"{document.name}: {line.strip()[:60]}"))
                else:
                    needs = needs and bool(line.strip())
    return found


def flags_of(script, arguments):
    """The flags that a script of ours takes, asked of its own parser."""
    import importlib

    import run
    import train_advanced
    import train_ultrathink

    if script == "run.py" and arguments and arguments[0] in run.COMMANDS:
        module = importlib.import_module(run.COMMANDS[arguments[0]][0])
        return module.make_parser()
    parsers = {
        "run.py": run.make_parser,
        "train_advanced.py": train_advanced.make_parser,
        "scripts/run_training.bat": train_advanced.make_parser,
        "train_ultrathink.py": train_ultrathink.make_parser,
    }
    return parsers[script]() if script in parsers else None


@pytest.mark.parametrize("line", commands())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_documented_command_is_one_that_is_taken(line):
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words = words[1:]
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets) | {word for word in words if "=" in word}
        return
    scripts = [word for word in words if word.endswith((".py", ".bat")) and not word.startswith("-")]
    if not scripts:
        assert program in PROGRAMS or shutil.which(program, path=str(Path(sys.executable).parent)), line
        return
    script = scripts[0]
    assert (ROOT / script).is_file(), script
    arguments = words[words.index(script) + 1 :]
    parser = flags_of(script, arguments)
    if parser is None:
        return
    known = {flag for action in parser._actions for flag in action.option_strings}
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert given <= known, given - known
    overrides = arguments[arguments.index("--override") + 1 :] if "--override" in arguments else []
    for override in overrides:
        key = override.partition("=")[0].rpartition(":")[2]
        if "." in key and not key.startswith("-"):
            from ultrathink_model.config.load import valid_keys

            assert key in valid_keys(), override
    for name in [word for word in arguments if word.startswith(("configs/", "stack_configs/"))]:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path):
    mkdocs = Path(sys.executable).parent / "mkdocs"
    if not mkdocs.exists():
        pytest.skip("mkdocs is not installed: make docs")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
