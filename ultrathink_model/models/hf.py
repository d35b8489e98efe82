"""A model as a Hugging Face folder: written whole, read back, with no pickle in it."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from ultrathink_model.config import Config, load_config, save_config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.hf_config import CONFIG_FILE, config_from_hugging_face, hugging_face_config
from ultrathink_model.models.model_folder import existing_folder, replaced_folder
from ultrathink_model.models.qwen3_weights import from_qwen3, to_qwen3
from ultrathink_model.models.transformer import Transformer, build_model
from ultrathink_model.models.weight_files import WeightFiles, write_weights

RUN_CONFIG_FILE = "ultrathink.yaml"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def save_model(
    model: Transformer,
    tokenizer_folder: Path,
    folder: Path,
    config: Config | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model folder that `transformers` loads, whole or not at all.

    A folder that stands there already stays readable until the new one takes its place.

    Args:
        model: The model.
        tokenizer_folder: Holds the tokenizer's Hugging Face files, which are copied.
        folder: Where the model goes.
        config: The run's config, kept as `ultrathink.yaml`; None takes the model's.
        state: Weights and buffers under the model's own names, where a strategy has gathered them from its ranks;
            None takes the model's.

    Raises:
        CheckpointError: `tokenizer_folder` holds no tokenizer.
    """
    tokenizer = _tokenizer_files(Path(tokenizer_folder))
    config = config or model.config
    state = model.state_dict() if state is None else state
    with replaced_folder(Path(folder)) as new:
        write_weights(to_qwen3(state, config), new)
        for path in tokenizer:
            shutil.copyfile(path, new / path.name)
        special_ids = _special_ids(Path(tokenizer_folder))
        write_json(new / CONFIG_FILE, hugging_face_config(config) | special_ids | {"dtype": _dtype(state)})
        write_json(new / "generation_config.json", special_ids | {"do_sample": True})
        save_config(config, new / RUN_CONFIG_FILE)
        (new / "README.md").write_text(_card(config, model), encoding="utf-8")


def read_model_config(folder: Path) -> Config:
    """The config of a model folder: ours where it was written by us, else one made from its `config.json`.

    Raises:
        CheckpointError: The folder is missing, or holds no model of ours and no Qwen3 or Qwen3-MoE.
    """
    folder = existing_folder(Path(folder))
    own = folder / RUN_CONFIG_FILE
    return load_config(own) if own.is_file() else config_from_hugging_face(folder)


def load_model(folder: Path, device: torch.device | str = "cpu") -> Transformer:
    """The model of a folder, in float32.

    Raises:
        CheckpointError: The folder holds no model of ours and no Qwen3 or Qwen3-MoE, or is damaged.
    """
    config = read_model_config(folder)
    model = build_model(config, device)
    copy_weights(model, read_weights(folder, config), folder)
    return model


def read_weights(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Each weight of a model folder under our names, read as it is asked for.

    Raises:
        CheckpointError: Files or weights are missing or damaged.
    """
    return from_qwen3(WeightFiles(existing_folder(Path(folder))), config)


@torch.no_grad()
def copy_weights(model: Transformer, weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Fills the model with `weights`, which must fit it.

    Raises:
        CheckpointError: A weight has another shape than the model's.
    """
    state = model.state_dict()
    for name, weight in weights:
        if weight.shape != state[name].shape:
            raise CheckpointError(
                f"{folder}: {name} is {tuple(weight.shape)} there and {tuple(state[name].shape)} by its own config; "
                "its files do not belong together."
            )
        state[name].copy_(weight)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes indented JSON in UTF-8."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise CheckpointError(
            f"{folder} holds no tokenizer.json, so the model could not be used; prepare the data again."
        )
    return files


def _special_ids(folder: Path) -> dict[str, int]:
    """Ids of the tokenizer's begin, end and padding token, as far as it names them."""
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: dict[str, int] = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        number = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        if number is not None:
            ids[f"{name}_token_id"] = number
    return ids


def _dtype(state: Mapping[str, Tensor]) -> str:
    return str(state["embedding.weight"].dtype).removeprefix("torch.")


def _card(config: Config, model: Transformer) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = config.model
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# ULTRATHINK model

A causal language model with {parameters:,} parameters: {shape.num_layers} blocks of width {shape.hidden_size}, a
vocabulary of {shape.vocab_size:,} and sequences of {shape.max_seq_length:,} tokens. Trained on `{config.data.dataset}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

`ultrathink.yaml` holds the whole configuration of the run.
"""
