"""A Hugging Face folder for others: a copy of the model with what its users need beside the weights."""

import shutil
from pathlib import Path

from ultrathink_model.alignment.constitution import MODEL, PERSON
from ultrathink_model.config import Config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.hf import write_json
from ultrathink_model.models.hf_config import read_json
from ultrathink_model.models.tokenizer_files import CHAT_TEMPLATE_FILE, SETTINGS_FILE

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
GENERATION_FILE = "generation_config.json"
# The layout that alignment puts questions in. A turn of the model ends as its texts do, with the end-of-text token.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    f"{MODEL} {{{{ message['content'] | trim }}}}{{{{ eos_token }}}}"
    "{%- elif message['role'] == 'user' -%}"
    f"{PERSON} {{{{ message['content'] | trim }}}}{{{{ '\n\n' }}}}"
    "{%- else -%}"
    "{{ message['content'] | trim }}{{ '\n\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{MODEL}{{%- endif -%}}"
)


def write_huggingface(final_model: Path, folder: Path, config: Config) -> None:
    """Copies a model folder, with a chat template and the settings of generation.

    A chat template that the tokenizer brings stays; a model of ours gets the layout that it was aligned in.

    Args:
        final_model: The model.
        folder: An empty folder.
        config: Its config, whose sample texts set how the model is sampled by default.

    Raises:
        CheckpointError: The model's folder holds a pickle.
    """
    pickles = [path.name for path in final_model.rglob("*") if path.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{final_model} holds {', '.join(sorted(pickles))}: pickles run code when they are loaded and are not "
            "exported; save the model again as safetensors."
        )
    shutil.copytree(final_model, folder, dirs_exist_ok=True)
    write_chat_layout(folder)
    known = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).is_file() else {}
    write_json(folder / GENERATION_FILE, _sampling(config) | known)


def write_chat_layout(folder: Path) -> None:
    """Gives a folder the layout of conversations that our alignment uses, unless its tokenizer brings one.

    Beside the template goes how an answer is read back: for want of that, `transformers serve` takes Qwen3's marks, finds
    none in our layout, and repeats the question in the answer.
    """
    if has_chat_template(folder):
        return
    (folder / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    eos = settings.get("eos_token")
    ends = [eos["content"] if isinstance(eos, dict) else eos] if eos else []
    ends += [f"\n{turn}" for turn in (PERSON, MODEL)]
    template = {
        "defaults": {"role": "assistant"},
        "start_anchor": MODEL,
        "fields": {"content": {"close": ends, "content": "text"}},
    }
    write_json(folder / SETTINGS_FILE, settings | {"response_template": template})


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a folder lays out conversations."""
    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    return (folder / CHAT_TEMPLATE_FILE).is_file() or bool(settings.get("chat_template"))


def _sampling(config: Config) -> dict[str, object]:
    evaluation = config.evaluation
    if evaluation.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": evaluation.temperature, "top_p": evaluation.top_p}
