"""lm-eval on models of ours, without a network: parity with the built-in BLiMP, local files, and mistakes."""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `evaluation`")

from ultrathink_model.config import override_config
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.errors import ConfigError, DataError
from ultrathink_model.evaluation import harness
from ultrathink_model.evaluation.blimp import blimp_metrics
from ultrathink_model.evaluation.harness import task_metrics
from ultrathink_model.evaluation.task_files import check_inputs, read_rows
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.models.transformer import build_model

pytestmark = [
    # lm-eval and what it brings along (its registry, sacrebleu, nltk) use what their own dependencies have given up.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PAIRS = [
    (f"The {noun} {good} strong.", f"The {noun} {bad} strong.")
    for noun, good, bad in (
        ("state", "is", "are"),
        ("people", "are", "is"),
        ("roads", "were", "was"),
        ("union", "is", "be"),
    )
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def folder(text_config, manifest, tmp_path):
    save_model(build_model(text_config), manifest.tokenizer_folder, tmp_path / "final_model")
    return tmp_path / "final_model"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder, config, *tasks, **settings):
    overrides = [f"evaluation.{name}={value}" for name, value in settings.items()]
    tasks = json.dumps([str(task) for task in tasks])
    return task_metrics(folder, override_config(config, [f"evaluation.tasks={tasks}", *overrides]), "cpu")


def test_lm_eval_and_the_built_in_blimp_agree_pair_by_pair(folder, text_config, tmp_path):
    (tmp_path / "blimp").mkdir()
    model, tokenizer = load_model(folder).eval(), Tokenizer.load(folder)
    found, built_in = [], []
    for number, (good, bad) in enumerate(PAIRS):
        write(tmp_path / "blimp" / f"pair{number}.jsonl", [{"sentence_good": good, "sentence_bad": bad}])
        found.append(write(tmp_path / f"pair{number}.jsonl", [{"choices": [good, bad], "answer": 0}]))
    metrics = run(folder, text_config, *found)
    own = blimp_metrics(model, tokenizer, tmp_path / "blimp", None, batch_size=4)
    built_in = [own[f"eval/blimp_pair{number}/accuracy"] for number in range(len(PAIRS))]
    assert [metrics[f"eval/pair{number}/acc"] for number in range(len(PAIRS))] == built_in
    assert len(set(built_in)) == 2, "pairs that all come out alike would show nothing"


def test_questions_prompts_and_texts_are_scored_with_standard_errors(folder, text_config, tmp_path):
    questions = [{"question": "The state is", "choices": ["strong", "weak", "old"], "answer": n % 3} for n in range(6)]
    tasks = [
        write(tmp_path / "questions.jsonl", questions),
        write(
            tmp_path / "prompts.jsonl", [{"prompt": "The state", "answer": "is"}, {"prompt": "We", "answer": "shall"}]
        ),
        write(tmp_path / "texts.jsonl", [{"text": "No nation was ever ruined by trade."}]),
    ]
    metrics = run(folder, text_config, *tasks)
    assert metrics["eval/questions/acc"] == pytest.approx(2 / 6)
    assert metrics["eval/questions/acc_stderr"] == pytest.approx((1 / 3 * 2 / 3 / 5) ** 0.5)
    assert metrics["eval/prompts/exact_match"] == 0.0
    # About log2(300) bits for each of its tokens, which are shorter than two bytes.
    assert 4 < metrics["eval/texts/bits_per_byte"] < 9


@pytest.mark.parametrize("shown", [0, 2])
def test_as_many_examples_as_asked_stand_before_each_question(folder, text_config, tmp_path, monkeypatch, shown):
    asked, make = [], harness._language_model

    def listening(*arguments):
        model = make(*arguments)
        answer = model.loglikelihood
        monkeypatch.setattr(
            model, "loglikelihood", lambda requests: asked.extend(r.args[0] for r in requests) or answer(requests)
        )
        return model

    monkeypatch.setattr(harness, "_language_model", listening)
    questions = [{"question": f"Q{n}:", "choices": ["a", "b"], "answer": n % 2} for n in range(4)]
    run(folder, text_config, write(tmp_path / "questions.jsonl", questions), num_fewshot=shown)
    assert [text.count("Q") for text in asked] == [shown + 1] * 8


def test_a_folder_of_yaml_runs_all_its_tasks_on_as_many_documents_as_asked(folder, text_config, tmp_path):
    data = write(tmp_path / "data.json", [{"good": good, "bad": bad} for good, bad in PAIRS])
    (tmp_path / "tasks").mkdir()
    for name, answer in (("first", 0), ("second", 1)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            f"output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_choice: '{{{{[good, bad]}}}}'\ndoc_to_target: {answer}\n"
            "metric_list: [{metric: acc}]\n",
            encoding="utf-8",
        )
    metrics = run(folder, text_config, tmp_path / "tasks", task_samples=3)
    assert metrics["eval/first/acc"] == pytest.approx(1 - metrics["eval/second/acc"])
    assert metrics["eval/first/acc"] * 3 == pytest.approx(round(metrics["eval/first/acc"] * 3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no YAML file"):
        run(folder, text_config, tmp_path / "empty")


@pytest.mark.slow
def test_our_own_architecture_runs_too_and_names_need_the_network_or_a_mirror(
    text_config, manifest, tmp_path, monkeypatch
):
    config = override_config(text_config, ["advanced.enable_dre=true", "advanced.enable_moe=true"])
    save_model(build_model(config), manifest.tokenizer_folder, tmp_path / "own")
    task = write(tmp_path / "choice.jsonl", [{"choices": list(pair), "answer": 0} for pair in PAIRS])
    assert 0 <= run(tmp_path / "own", config, task)["eval/choice/acc"] <= 1
    with pytest.raises(DataError, match="Without a network, name YAML or JSONL files"):
        run(tmp_path / "own", config, "hellaswag")
    mirror = tmp_path / "mirror" / "Rowan" / "hellaswag"
    mirror.mkdir(parents=True)
    row = {"activity_label": "Congress", "ctx_a": "We meet.", "ctx_b": "we", "endings": ["vote.", "pay."], "label": "1"}
    for split in ("train", "validation"):
        write(mirror / f"{split}.jsonl", [row, row | {"label": "0"}])
    monkeypatch.chdir(tmp_path / "mirror")
    assert run(tmp_path / "own", config, "hellaswag")["eval/hellaswag/acc"] == 0.5
    with pytest.raises(ConfigError, match=r"no task hellaswagg.* Did you mean hellaswag"):
        run(tmp_path / "own", config, "hellaswagg")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"choices": ["a", "b"], "answer": 2}], "answer 2 is not among its 2 choices"),
        ([{"choices": ["a", "b"], "answer": "c"}], "'c' is not in list"),
        ([{"prompt": "a"}], "'answer'"),
        ([{"text": "a"}, {"prompt": "a", "answer": "b"}], "line 2 .* another form than the first"),
        ([{"text": ""}], "its text is empty"),
        ([], "is empty"),
    ],
)
def test_a_file_that_is_no_task_is_refused_before_a_run_begins(text_config, tmp_path, rows, message):
    path = write(tmp_path / "wrong.jsonl", rows)
    with pytest.raises(DataError, match=message):
        check_inputs(override_config(text_config, [f"evaluation.tasks=[{path}]"]).evaluation)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "tasks/nowhere", "notes.txt"])
def test_a_path_that_is_no_task_is_refused_before_a_run_begins(text_config, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ConfigError, match=name):
        check_inputs(override_config(text_config, [f"evaluation.tasks=[{name}]"]).evaluation)
    with pytest.raises(ConfigError, match=r"evaluation\.blimp=nowhere is no folder"):
        check_inputs(override_config(text_config, ["evaluation.blimp=nowhere"]).evaluation)


def test_answers_may_be_named_by_their_text(tmp_path):
    path = write(tmp_path / "named.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": "b"}])
    assert read_rows(path) == [{"question": "q", "choices": ["a", "b"], "answer": 1}]
