"""`config.json`: our architecture in the words of `transformers`, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ultrathink_model.config import Config, make_config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.hf_code import AUTO_MAP, MEDIA_AUTO_MAP, PROCESSOR_CLASS

CONFIG_FILE = "config.json"
OWN_MODEL_TYPE = "ultrathink"
# The sections that the model's modules read.
ARCHITECTURE_SECTIONS = ("model", "advanced", "moe", "dre", "multimodal")


def is_own_architecture(config: Config) -> bool:
    """Whether `transformers` has no class for the model, so that its folder must bring the modelling code."""
    has_bias = config.advanced.enable_moe and config.moe.router_bias_rate > 0
    advanced = config.advanced
    return advanced.enable_dre or advanced.enable_constitutional or advanced.enable_multimodal or has_bias


def hugging_face_config(config: Config) -> dict[str, Any]:
    """The content of `config.json`: Qwen3's, Qwen3-MoE's where any block is a mixture, or that of our own class."""
    if is_own_architecture(config):
        return _own_config(config)
    return _mixture_config(config) if config.advanced.enable_moe else _dense_config(config)


def _own_config(config: Config) -> dict[str, Any]:
    return _shared_config(config) | {
        "architectures": ["UltrathinkForCausalLM"],
        "model_type": OWN_MODEL_TYPE,
        "auto_map": AUTO_MAP | (MEDIA_AUTO_MAP if config.advanced.enable_multimodal else {}),
        "architecture": {name: _resolved(getattr(config, name)) for name in ARCHITECTURE_SECTIONS},
    }


def processor_config(config: Config) -> dict[str, Any]:
    """The content of `processor_config.json`."""
    return {
        "processor_class": PROCESSOR_CLASS,
        "auto_map": {"AutoProcessor": MEDIA_AUTO_MAP["AutoProcessor"]},
        "multimodal": _resolved(config.multimodal),
    }


def _resolved(section: BaseModel) -> dict[str, Any]:
    """Every value of a section, and what its properties make of them."""
    properties = [name for name, member in vars(type(section)).items() if isinstance(member, property)]
    return section.model_dump(mode="json") | {name: getattr(section, name) for name in properties}


def _dense_config(config: Config) -> dict[str, Any]:
    model = config.model
    windowed = model.sliding_window is not None
    return _shared_config(config) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_window_layers": 0 if windowed else model.num_layers,
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * model.num_layers,
    }


def _mixture_config(config: Config) -> dict[str, Any]:
    moe = config.moe
    return _shared_config(config) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": moe.layer_frequency,
        "mlp_only_layers": [],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_top_k,
        "moe_intermediate_size": expert_width(config),
        "norm_topk_prob": True,
        "router_aux_loss_coef": moe.load_balance_weight,
        "output_router_logits": False,
    }


def expert_width(config: Config) -> int:
    """Width of one expert, resolved."""
    return config.moe.expert_hidden_size or config.model.feed_forward_size // config.moe.moe_top_k


def _shared_config(config: Config) -> dict[str, Any]:
    model = config.model
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.feed_forward_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_length,
        # Twice, since readers outside of transformers 5 look for the flat key.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "initializer_range": model.initializer_range,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def config_from_hugging_face(folder: Path) -> Config:
    """The config of a folder that `transformers` wrote: Qwen3, Qwen3-MoE or our own class.

    All experts of a Qwen3-MoE go to the knowledge group, since the folder names no groups.

    Raises:
        CheckpointError: The model is of another type, or has a part that ours has not.
    """
    written = read_json(folder / CONFIG_FILE)
    if written.get("model_type") == OWN_MODEL_TYPE:
        return _config_of_own_class(written, folder)
    if written.get("model_type") not in ("qwen3", "qwen3_moe"):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: model_type {written.get('model_type')!r} is not one of qwen3, qwen3_moe, "
            f"{OWN_MODEL_TYPE}; name a final_model/ of ours or a Qwen3 or Qwen3-MoE folder."
        )
    return _config_of_qwen3(folder)


def _config_of_own_class(written: Mapping[str, Any], folder: Path) -> Config:
    sections = {name: vars(Config())[name] for name in ARCHITECTURE_SECTIONS}
    architecture = written["architecture"]
    values = {
        # A folder that was written before a section was thought of does not have it.
        name: {key: value for key, value in architecture.get(name, {}).items() if key in type(default).model_fields}
        for name, default in sections.items()
    }
    return make_config(values | {"data": {"tokenizer_name": str(folder)}}, origin=str(folder / CONFIG_FILE))


def _config_of_qwen3(folder: Path) -> Config:
    theirs = _with_defaults(folder)
    _refuse_what_differs(theirs, folder)
    model = {
        "vocab_size": theirs["vocab_size"],
        "hidden_size": theirs["hidden_size"],
        "num_layers": theirs["num_hidden_layers"],
        "num_heads": theirs["num_attention_heads"],
        "num_kv_heads": theirs["num_key_value_heads"],
        "head_dim": theirs.get("head_dim"),
        "intermediate_size": theirs["intermediate_size"],
        "max_seq_length": theirs["max_position_embeddings"],
        "rope_theta": theirs["rope_parameters"]["rope_theta"],
        "norm_eps": theirs["rms_norm_eps"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "sliding_window": _sliding_window(theirs),
        "initializer_range": theirs["initializer_range"],
    }
    values: dict[str, Any] = {"model": model, "data": {"tokenizer_name": str(folder)}}
    if theirs["model_type"] == "qwen3_moe":
        values["advanced"] = {"enable_moe": True}
        values["moe"] = {
            "num_knowledge_experts": theirs["num_experts"],
            **{f"num_{group}_experts": 0 for group in ("skill", "meta", "safety")},
            "moe_top_k": theirs["num_experts_per_tok"],
            "layer_frequency": theirs["decoder_sparse_step"],
            "expert_hidden_size": theirs["moe_intermediate_size"],
        }
    return make_config(values, origin=str(folder / CONFIG_FILE))


def _with_defaults(folder: Path) -> dict[str, Any]:
    """`config.json` with what it leaves out, since `transformers` need not write a value that is its default."""
    from transformers import AutoConfig  # noqa: PLC0415 - takes seconds, and our own folders do without

    theirs = AutoConfig.from_pretrained(folder)
    values: dict[str, Any] = theirs.to_dict()
    return values | {"num_experts": getattr(theirs, "num_experts", None)}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: The file is missing or does not hold a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; name the final_model/ folder of a finished run.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; copy or save the model again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not an object; copy or save the model again.")
    return values


def _refuse_what_differs(theirs: Mapping[str, Any], folder: Path) -> None:
    """Refuses what our architecture has no switch for; both families agree on the other values."""
    only = {
        "hidden_act": (theirs["hidden_act"], "silu"),
        "attention_bias": (theirs["attention_bias"], False),
        "rope_type": (theirs["rope_parameters"]["rope_type"], "default"),
        "kinds of attention in layer_types": (len(set(theirs.get("layer_types") or ["full_attention"])), 1),
        "mlp_only_layers": (theirs.get("mlp_only_layers") or [], []),
        "norm_topk_prob": (theirs.get("norm_topk_prob", True), True),
    }
    for name, (value, wanted) in only.items():
        if value != wanted:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: {name} is {value!r}, and our architecture has only {wanted!r}; "
                "take another model."
            )


def _sliding_window(theirs: Mapping[str, Any]) -> int | None:
    layer_types = theirs.get("layer_types")
    slides = theirs["use_sliding_window"] if layer_types is None else "sliding_attention" in layer_types
    window: int | None = theirs["sliding_window"]
    return window if slides else None
