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

# What runs each command, or plans it, in small: of the patterns that are found in it the first one counts. Targets of make are run by
# `.ci/run` (`setup` and `cloud` as what others need), and a shell's own words need no test.
RUN_BY = {
    r"^(source|export) ": None,
    r"^make ": ".ci/run",
    r"run\.py --workflow multi_gpu": "tests/pipelines/test_commands.py::test_multi_gpu_trains_over_two_ranks",
    r"run\.py --workflow production.*constitutional": "tests/pipelines/test_constitutional_workflow.py",
    r"run\.py --workflow .*multimodal": "tests/config/test_workflow.py::test_a_multimodal_prototype",
    r"run\.py --workflow .*(--profile small|export\.formats|ppo_epochs|--stack local)": "tests/config/test_workflow.py",
    r"run\.py --workflow production|zenml pipeline run": (
        "tests/pipelines/test_commands.py::test_production_runs_by_its_bare_name"
    ),
    r"run\.py --workflow prototype": ".ci/run",
    r"run\.py plan .*multimodal": "tests/planning/test_media_plan.py::test_large_plan_shows_media",
    r"run\.py plan ": "tests/planning/test_command.py::test_a_run_that_fits_has_its_time_and_cost",
    r"run\.py doctor": "tests/test_doctor.py::test_a_machine_that_is_set_up_is_well",
    r"run\.py chat": "tests/serving/test_conversation.py::test_terminal_streams_answers_to_lines",
    r"run\.py serve": "tests/serving/test_serve.py::test_the_openai_client_gets_the_models_own_words",
    r"run\.py export": "tests/export/test_huggingface.py::test_the_command_exports_in_the_formats_that_are_asked_for",
    r"run\.py compare": "tests/reporting/test_measures.py::test_compare_prints_the_figures_and_writes_the_page",
    r"run\.py (promote|rollback)": "tests/promotion/test_promote.py::test_the_alias_moves_to_the_next_and_back_again",
    r"run\.py status": "tests/pipelines/test_runs.py::test_status_names_runs_stages_and_places",
    r"run\.py rerun": "tests/pipelines/test_runs.py::test_rerun_from_a_step_does_it_and_those_after_it_anew",
    r"run\.py stacks": "tests/pipelines/test_stacks.py::test_the_command_says_what_it_does",
    r"zenml pipeline deploy|zenml login": "tests/pipelines/test_playground.py::test_the_playground_runs_the_workflow_again",
    r"mlflow ui": "tests/tracking/test_mlflow_faults.py::test_server_that_goes_down",
    r"scored_answers": "tests/data/test_scored_answers.py::test_file_that_is_written_is_what_alignment_reads",
    r"run_training\.bat": "tests/test_entry_points.py::test_the_batch_file_as_a_python_script",
    r"train_ultrathink\.py": "tests/test_entry_points.py::test_flags_alone",
    r"^torchrun|distributed\.enabled": "tests/test_cli_training.py::test_torchrun_trains_as_python_does",
    r"only_reward_model|reward_run": "tests/alignment/test_reward_stage.py::test_stage_leaves_a_reward_model_that_rlhf_takes",
    r"enable_rlhf": "tests/alignment/test_align.py::test_stage_leaves_the_run_folder_of_the_contract",
    r"critic=endpoint": "tests/alignment/test_critic_endpoint.py",
    r"--init-from": "tests/test_cli_training.py::test_init_from_starts_another_run_where_the_first_one_ended",
    r"evaluation\.blimp": "tests/evaluation/test_blimp.py::test_the_config_says_how_many_pairs_are_read",
    r"evaluation\.context_length": "tests/evaluation/test_context.py::test_every_token_of_the_split_is_in_one_bin",
    r"evaluation\.training_measures": "tests/evaluation/test_training_measures.py::test_measures_are_logged",
    r"evaluation\.tasks": "tests/evaluation/test_harness.py::test_questions_prompts_and_texts_are_scored",
    r"cleaning\.": "tests/data/cleaning/test_clean.py",
    r"mix_datasets": "tests/data/test_prepare.py::test_a_mixture_keeps_each_source_apart",
    r"dataset=wikitext": "tests/data/test_hub.py::test_a_hub_dataset_is_downloaded_streamed_and_then_found_in_the_cache",
    r"dataset=dummy": "tests/test_entry_points.py::test_dummy_data_and_samples",
    r"train_advanced\.py": "tests/test_cli_training.py::test_a_run_leaves_exactly_the_folder_of_the_contract",
}


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


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_is_run_by_a_test(line):
    runs = next((run for pattern, run in RUN_BY.items() if re.search(pattern, line)), "")
    assert runs != "", f"no test runs it: {line}"
    if runs is not None:
        path, _, name = runs.partition("::")
        assert name in (ROOT / path).read_text(encoding="utf-8"), runs


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
