"""GGUF, the format of llama.cpp: a model and its tokenizer in one file, for the architectures that llama.cpp has."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultrathink_model.config import Config
from ultrathink_model.errors import CheckpointError
from ultrathink_model.export.extras import require
from ultrathink_model.models.hf_config import expert_width, read_json
from ultrathink_model.models.tokenizer_files import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, special_ids
from ultrathink_model.models.weight_files import WeightFiles

# Numbers that share a scale in Q8_0; matrices whose rows are no multiple of it stay in float32, as llama.cpp has it.
BLOCK = 32
EXPERT = re.compile(r"\.experts\.\d+\.")
# How llama.cpp calls the patterns by which a tokenizer cuts text into words. It has its own code for each.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}\p{{N}}{_REST}": "qwen2",
}


def write_gguf(folder: Path, config: Config, path: Path, *, int8: bool = False) -> None:
    """Writes a GGUF file of a Hugging Face folder, in float32 or with the matrices in Q8_0.

    Q8_0 is llama.cpp's int8: each 32 weights of a row share a scale in float16. Norms and routers stay in float32.

    Args:
        folder: A folder of Qwen3 or Qwen3-MoE.
        config: The model's config.
        path: The file to write.
        int8: Whether matrices are quantised.

    Raises:
        CheckpointError: llama.cpp cannot cut text as the tokenizer does.
        DependencyError: `gguf` is not installed.
    """
    gguf = require("gguf", "export")
    architecture = "qwen3moe" if config.advanced.enable_moe else "qwen3"
    writer = gguf.GGUFWriter(path, architecture)
    _add_shape(writer, config, path.stem, int8)
    _add_tokenizer(writer, folder, config.model.vocab_size)
    weights = _Weights(folder, architecture, config)
    kinds = {name: _kind(name, shape, int8) for name, shape in weights.shapes()}
    for name, shape in weights.shapes():
        size = int(np.prod(shape))
        # Q8_0 takes 34 bytes for 32 numbers.
        nbytes = size // BLOCK * 34 if kinds[name] == "Q8_0" else 4 * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, gguf.GGMLQuantizationType[kinds[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in weights.items():
        writer.write_tensor_data(gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kinds[name]]))
    writer.close()


def _kind(name: str, shape: tuple[int, ...], int8: bool) -> str:
    is_matrix = len(shape) > 1 and "ffn_gate_inp" not in name
    return "Q8_0" if int8 and is_matrix and shape[-1] % BLOCK == 0 else "F32"


def _add_shape(writer: Any, config: Config, name: str, int8: bool) -> None:
    gguf = require("gguf", "export")
    model, moe = config.model, config.moe
    writer.add_name(name)
    if config.export.licence:
        writer.add_license(config.export.licence)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if int8 else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(model.max_seq_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.feed_forward_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_vocab_size(model.vocab_size)
    if config.advanced.enable_moe:
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.moe_top_k)
        writer.add_expert_feed_forward_length(expert_width(config))


def _add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """The vocabulary, one entry for each row of the embedding, and the merges of a byte-level BPE."""
    gguf = require("gguf", "export")
    written = read_json(folder / TOKENIZER_FILE)
    special = {token["id"]: token for token in written["added_tokens"]}
    texts = {number: text for text, number in written["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in special.items()}
    kinds = []
    for number in range(vocab_size):
        if number not in texts:
            kinds.append(gguf.TokenType.UNUSED)
        elif number not in special:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            kinds.append(gguf.TokenType.CONTROL if special[number]["special"] else gguf.TokenType.USER_DEFINED)
    merges = written["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(written, folder))
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name, number in special_ids(folder).items():
        getattr(writer, f"add_{name}")(number)
    writer.add_add_bos_token(False)
    template = folder / CHAT_TEMPLATE_FILE
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _pre_tokenizer(written: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the way in which a tokenizer cuts text.

    Raises:
        CheckpointError: It has none.
    """
    parts = written.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    if byte_level and byte_level[0]["use_regex"] and not patterns and not byte_level[0]["add_prefix_space"]:
        return "gpt-2"
    if written["model"]["type"] == "BPE" and byte_level and len(patterns) == 1 and patterns[0] in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[patterns[0]]
    raise CheckpointError(
        f"{folder / TOKENIZER_FILE}: llama.cpp is not known to cut text as this {written['model']['type']} tokenizer does "
        f"({json.dumps(parts)[:200]}); leave gguf out of export.formats, or train with a byte-level BPE such as "
        "data.tokenizer_name=train."
    )


class _Weights:
    """The weights of a folder under GGUF's names; the experts of a block are one tensor there."""

    def __init__(self, folder: Path, architecture: str, config: Config) -> None:
        gguf = require("gguf", "export")
        kind = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
        self._files = WeightFiles(folder)
        self._names = gguf.get_tensor_name_map(kind, config.model.num_layers)
        self._sources: dict[str, list[str]] = {}
        for source in self._files:
            if source == "lm_head.weight" and config.model.tie_embeddings:
                continue
            name = self._name_of(EXPERT.sub(".experts.", source), folder)
            self._sources.setdefault(name, []).append(source)
        for sources in self._sources.values():
            sources.sort(key=lambda source: [int(part) for part in source.split(".") if part.isdigit()])

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each."""
        for name, sources in self._sources.items():
            shape = tuple(self._files[sources[0]].shape)
            yield name, (len(sources), *shape) if "_exps" in name else shape

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each, in float32, read one after the other."""
        for name, sources in self._sources.items():
            parts = [self._files[source].float() for source in sources]
            weight = torch.stack(parts) if "_exps" in name else parts[0]
            yield name, weight.contiguous().numpy()

    def _name_of(self, source: str, folder: Path) -> str:
        name = self._names.get_name(source, try_suffixes=(".weight",))
        if name is None:
            raise CheckpointError(f"{folder}: llama.cpp has no place for the weight {source}; save the model again.")
        return str(name)
