"""A model as a Hugging Face folder: written whole, read back, with no pickle in it."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrathink_model.config import Config, load_config, save_config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.hf_code import write_modelling_code
from ultrathink_model.models.hf_config import (
    CONFIG_FILE,
    config_from_hugging_face,
    hugging_face_config,
    is_own_architecture,
    processor_config,
    read_json,
)
from ultrathink_model.models.model_folder import existing_folder, replaced_folder
from ultrathink_model.models.qwen3_weights import from_qwen3, to_qwen3
from ultrathink_model.models.tokenizer_files import placeholder_ids, special_ids, tokenizer_files
from ultrathink_model.models.transformer import Transformer, build_model
from ultrathink_model.models.weight_files import WeightFiles, write_weights

RUN_CONFIG_FILE = "ultrathink.yaml"
PROCESSOR_FILE = "processor_config.json"
# Loads and thresholds of the routers beside Qwen3's weights, where readers of its safetensors do not stumble on them.
ROUTING_FILE = "routing_state.json"
# Our model is the attribute `model` of the class that `transformers` loads.
OWN_PREFIX = "model."
TIED_HEAD = "lm_head.weight"
# Tokenizer, code, headers and the file system's own needs beside the weights.
SPARE_BYTES = 32 << 20


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
        CheckpointError: `tokenizer_folder` holds no tokenizer, or the disk is too full.
    """
    tokenizer = tokenizer_files(Path(tokenizer_folder))
    config = _without_folders(config or model.config)
    state = model.state_dict() if state is None else state
    size = SPARE_BYTES + sum(tensor.nbytes for tensor in state.values())
    with replaced_folder(Path(folder), size) as new:
        _write_state(state, model, new)
        for path in tokenizer:
            shutil.copyfile(path, new / path.name)
        ids, architecture = special_ids(Path(tokenizer_folder)), _without_folders(model.config)
        media_ids = {}
        if architecture.advanced.enable_multimodal:
            media_ids = placeholder_ids(Path(tokenizer_folder))
            write_json(new / PROCESSOR_FILE, processor_config(architecture))
        write_json(new / CONFIG_FILE, hugging_face_config(architecture) | ids | media_ids | {"dtype": _dtype(state)})
        write_json(new / "generation_config.json", ids)
        save_config(config, new / RUN_CONFIG_FILE)
        (new / "README.md").write_text(_card(config, model), encoding="utf-8")


def _without_folders(config: Config) -> Config:
    """The config of a folder that holds its encoders itself."""
    return config.model_copy(update={"multimodal": config.multimodal.without_folders()})


def _write_state(state: Mapping[str, Tensor], model: Transformer, folder: Path) -> None:
    if is_own_architecture(model.config):
        write_weights(((f"{OWN_PREFIX}{name}", tensor) for name, tensor in state.items()), folder)
        write_modelling_code(folder, with_processor=model.config.advanced.enable_multimodal)
        return
    write_weights(to_qwen3(state, model.config), folder)
    parameters = {name for name, _ in model.named_parameters()}
    buffers = {name: tensor.tolist() for name, tensor in state.items() if name not in parameters}
    if buffers:
        write_json(folder / ROUTING_FILE, buffers)


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
    state = model.state_dict()
    for name, weight in read_weights(folder, config):
        copy_weight(state, name, weight, folder)
    return model


def read_weights(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Each weight of a model folder under our names, read as it is asked for.

    Raises:
        CheckpointError: Files or weights are missing or damaged.
    """
    folder = existing_folder(Path(folder))
    files = WeightFiles(folder)
    if is_own_architecture(config):
        with torch.device("meta"):
            names = Transformer(config).state_dict()
        yield from ((name, files[f"{OWN_PREFIX}{name}"]) for name in names)
    else:
        yield from from_qwen3(files, config)
    # Tied models are sometimes saved with the copy.
    unknown = [name for name in files.unread if not (config.model.tie_embeddings and name == TIED_HEAD)]
    if unknown:
        raise CheckpointError(
            f"{folder}: its safetensors hold {len(unknown)} weights that its config has no place for, "
            f"{', '.join(unknown[:3])} among them; its files do not belong together, or it is another architecture."
        )
    if (folder / ROUTING_FILE).is_file():
        yield from ((name, torch.tensor(values)) for name, values in read_json(folder / ROUTING_FILE).items())


@torch.no_grad()
def copy_weight(state: Mapping[str, Tensor], name: str, weight: Tensor, folder: Path) -> None:
    """Copies a weight of `folder` into the model's state, whatever its number format.

    Raises:
        CheckpointError: It has another shape than the model's.
    """
    if weight.shape != state[name].shape:
        raise CheckpointError(
            f"{folder}: {name} is {tuple(weight.shape)}, where its config makes {tuple(state[name].shape)}; "
            "its files do not belong together. Copy or save the model again."
        )
    state[name].copy_(weight)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes indented JSON in UTF-8."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dtype(state: Mapping[str, Tensor]) -> str:
    return str(state["embedding.weight"].dtype).removeprefix("torch.")


def _card(config: Config, model: Transformer) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = config.model
    trust = ", trust_remote_code=True" if is_own_architecture(config) else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# ULTRATHINK model

A causal language model with {parameters:,} parameters: {shape.num_layers} blocks of width {shape.hidden_size}, a
vocabulary of {shape.vocab_size:,} and sequences of {shape.max_seq_length:,} tokens. Trained on `{config.data.dataset}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained(".")
```

`ultrathink.yaml` holds the whole configuration of the run.
"""
