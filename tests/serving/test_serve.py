"""`run.py serve`, asked by the `openai` client as any program would."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultrathink_model.errors import CheckpointError, ConfigError, DependencyError
from ultrathink_model.export.huggingface import CHAT_TEMPLATE
from ultrathink_model.models.generation import generate
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.models.tokenizer_files import vocabulary as vocabulary_of
from ultrathink_model.serving import serve

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

    def start(folder):
        port = free_port()
        command = [sys.executable, str(ROOT / "run.py"), "serve", str(folder), "--port", str(port), "--device", "cpu"]
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
    client = serving(folder)
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
    assert whole.choices[0].message.content.strip() == expected_answer(folder / "final_model", 8)
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


def expected_answer(folder, new_tokens):
    """What our own generation says greedily: the answer alone, without the question."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(text, return_tensors="pt").input_ids
    found = generate(
        load_model(folder), prompt, max_new_tokens=new_tokens, temperature=0.0, stop_token_ids=[tokenizer.eos_token_id]
    )
    return tokenizer.decode(found.tokens[0][found.mask[0]], skip_special_tokens=True).strip()


def test_vllm_is_taken_only_where_it_can_serve_the_model():
    assert serve.choose_engine("transformers", own_architecture=False) == "transformers"
    assert serve.choose_engine("auto", own_architecture=True) == "transformers"
    with pytest.raises(ConfigError, match="reasoning engine"):
        serve.choose_engine("vllm", own_architecture=True)
    if not serve.importlib.util.find_spec("vllm"):
        with pytest.raises(DependencyError, match="vllm"):
            serve.choose_engine("vllm", own_architecture=False)


def test_folder_whose_name_the_server_would_misread_is_refused(finished_run, tmp_path):
    folder = (finished_run("run") / "final_model").rename(tmp_path / "model@home")
    with pytest.raises(CheckpointError, match="rename the folder"):
        serve.main([str(folder)])
