"""`run.py serve`, asked by the `openai` client as any program would."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ultrathink_model.errors import CheckpointError, ConfigError, DependencyError
from ultrathink_model.export.huggingface import CHAT_TEMPLATE
from ultrathink_model.models.generation import generate
from ultrathink_model.models.guard import Guard
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.models.tokenizer_files import vocabulary as vocabulary_of
from ultrathink_model.serving import serve
from ultrathink_model.serving.conversation import REFUSAL

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300
OWN = ["advanced.enable_dre=true", "advanced.enable_moe=true", "advanced.enable_constitutional=true"]
QUESTION = "Who goes there?"


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.fixture
def serving(tmp_path):
    """Starts a server for a folder, and gives a client of it once it answers."""
    openai = pytest.importorskip("openai")
    processes = []

    def start(folder, *flags):
        port = free_port()
        command = [sys.executable, str(ROOT / "run.py"), "serve", str(folder), "--port", str(port), "--device", "cpu"]
        command += flags
        log = (tmp_path / "server.log").open("w")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
        processes.append((process, log))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        deadline = time.time() + START_SECONDS
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.time() < deadline, (tmp_path / "server.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.5)
            else:
                return client

    yield start
    for process, log in processes:
        process.terminate()
        process.wait(60)
        log.close()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], OWN], ids=["qwen3", "own architecture"])
def test_the_openai_client_gets_the_models_own_words_whole_and_streamed(finished_run, serving, overrides):
    folder = finished_run("run", "model.tie_embeddings=false", *overrides)
    speak_letters(folder / "final_model")
    guard = guard_midway(folder / "final_model", 8) if overrides else None
    client = serving(folder, *([] if guard is None else [f"--guard={guard.threshold}"]))
    asked = {
        "model": "final_model",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 8,
        "temperature": 0.0,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    # `transformers serve` repeats the question before an answer that it does not know how to read.
    assert whole.choices[0].message.content
    assert QUESTION not in whole.choices[0].message.content + streamed
    assert whole.choices[0].message.content.strip() == expected_answer(folder / "final_model", 8, guard)
    assert streamed.strip() == whole.choices[0].message.content.strip()
    assert 1 <= whole.usage.completion_tokens <= 8
    assert whole.choices[0].finish_reason in ("length", "stop")


def speak_letters(folder):
    """Leaves only letters likely: streams hold back what is no whole character."""
    model = load_model(folder)
    vocabulary = vocabulary_of(folder)
    silent = [number for text, number in vocabulary.items() if not text.isascii() or not text.isalpha()]
    model.head.weight.data[silent] = 0.0
    model.head.weight.data[len(vocabulary) :] = 0.0
    save_model(model, folder, folder)


def asked_of(folder):
    """The tokenizer, and the question as it lays it out."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    return tokenizer, tokenizer(text, return_tensors="pt").input_ids


@torch.no_grad()
def guard_midway(folder, new_tokens):
    """A guard with a threshold that the answer passes after its first tokens, and not before."""
    tokenizer, prompt = asked_of(folder)
    model = load_model(folder)
    answer = generate(model, prompt, max_new_tokens=new_tokens, temperature=0.0).tokens
    hidden = model(torch.cat((prompt, answer), dim=1), return_logits=False).hidden
    harm = model.harm_head(hidden[0, prompt.shape[1] - 1 : -1]).sigmoid().amax(-1)
    before = harm.cummax(0).values[:-1]
    place = 1 + int((harm[2:] - before[1:]).argmax()) + 1
    assert harm[place] > before[place - 1] + 1e-4, "no token of the answer raises the score"
    threshold = float(harm[place] + before[place - 1]) / 2
    return Guard(threshold=threshold, redirect=tokenizer(REFUSAL, add_special_tokens=False).input_ids)


def expected_answer(folder, new_tokens, guard):
    """What our own generation says greedily: the answer alone, without the question."""
    tokenizer, prompt = asked_of(folder)
    found = generate(
        load_model(folder),
        prompt,
        max_new_tokens=new_tokens,
        temperature=0.0,
        stop_token_ids=[tokenizer.eos_token_id],
        guard=guard,
    )
    assert guard is None or bool(found.guarded.all())
    return tokenizer.decode(found.tokens[0][found.mask[0]], skip_special_tokens=True).strip()


def test_vllm_is_taken_only_where_it_can_serve_the_model():
    assert serve.choose_engine("transformers", own_architecture=False) == "transformers"
    assert serve.choose_engine("auto", own_architecture=True) == "transformers"
    with pytest.raises(ConfigError, match="reasoning engine"):
        serve.choose_engine("vllm", own_architecture=True)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        serve.choose_engine("vllm", own_architecture=False, device="cuda:1")
    if not serve.importlib.util.find_spec("vllm"):
        with pytest.raises(DependencyError, match="vllm"):
            serve.choose_engine("vllm", own_architecture=False)


@pytest.mark.parametrize("code", [0, 3])
def test_vllm_is_started_on_the_folder_and_its_failure_told(tmp_path, monkeypatch, code):
    # What stands in for vLLM, which needs a GPU, shows how it is called and how its end is taken.
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    package.joinpath("api_server.py").write_text(
        f"import sys\nfrom pathlib import Path\nPath('asked').write_text(' '.join(sys.argv[1:]))\nsys.exit({code})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if code:
        with pytest.raises(DependencyError, match="ended with code 3"):
            serve.serve_by_vllm(tmp_path / "final_model", 8123)
    else:
        serve.serve_by_vllm(tmp_path / "final_model", 8123)
    flags = f"--model {tmp_path}/final_model --served-model-name final_model --host 127.0.0.1 --port 8123"
    assert (tmp_path / "asked").read_text() == flags


def test_folder_whose_name_the_server_would_misread_is_refused(finished_run, tmp_path):
    folder = (finished_run("run") / "final_model").rename(tmp_path / "model@home")
    with pytest.raises(CheckpointError, match="rename the folder"):
        serve.main([str(folder)])
