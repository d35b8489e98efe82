import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.config.export import check_formats
from ultrathink_model.errors import CheckpointError, ConfigError
from ultrathink_model.export.gguf_file import write_gguf
from ultrathink_model.models.hf import load_model, read_model_config
from ultrathink_model.models.weight_files import WeightFiles
from ultrathink_model.workflow import plan_workflow

gguf = pytest.importorskip("gguf")

UNTIED = ["model.tie_embeddings=false"]
MIXTURE = ["advanced.enable_moe=true", "moe.expert_hidden_size=48"]


def read_file(path):
    """The fields and the weights of a GGUF file, by name."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("overrides", [[], UNTIED, MIXTURE], ids=["tied", "untied", "experts"])
def test_weights_and_vocabulary_read_back_are_the_models(make_run, tmp_path, overrides):
    folder = make_run("run", overrides=overrides)
    path = tmp_path / "model.gguf"
    write_gguf(folder, read_model_config(folder), path)
    fields, tensors = read_file(path)
    weights = WeightFiles(folder)
    assert sum(int(tensor.n_elements) for tensor in tensors.values()) == sum(w.numel() for w in weights.values())
    values = {name: torch.from_numpy(np.array(tensor.data)) for name, tensor in tensors.items()}
    assert values["blk.1.attn_k.weight"].equal(weights["model.layers.1.self_attn.k_proj.weight"])
    assert ("output.weight" in values) is (overrides == UNTIED)
    if overrides == MIXTURE:
        assert values["blk.0.ffn_down_exps.weight"][5].equal(weights["model.layers.0.mlp.experts.5.down_proj.weight"])
        assert fields["qwen3moe.expert_used_count"] == 2
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert all(tokens[number] == text for text, number in vocabulary.items())
    assert len(tokens) == 300
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == vocabulary["<|endoftext|>"]


def test_int8_weights_are_near_the_models_and_norms_are_equal(make_run, tmp_path):
    folder = make_run("run")
    write_gguf(folder, read_model_config(folder), tmp_path / "model.gguf", int8=True)
    _, tensors = read_file(tmp_path / "model.gguf")
    down, norm = tensors["blk.0.ffn_down.weight"], tensors["output_norm.weight"]
    assert (down.tensor_type.name, norm.tensor_type.name) == ("Q8_0", "F32")
    found = gguf.quants.dequantize(down.data, down.tensor_type)
    weight = WeightFiles(folder)["model.layers.0.mlp.down_proj.weight"].numpy()
    # Half a step of 1/127 of a block's largest, and the scale's own rounding to float16.
    assert np.abs(found - weight).max() <= np.abs(weight).max() / 127 * 0.51
    assert not np.array_equal(found, weight)


def test_tokenizer_that_llama_cpp_does_not_know_is_refused(make_run, tmp_path):
    folder = make_run("run")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="Whitespace"):
        write_gguf(folder, read_model_config(folder), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("part", "overrides"),
    [
        ("enable_dre", ["advanced.enable_dre=true"]),
        ("enable_constitutional", ["advanced.enable_constitutional=true"]),
        ("router_bias_rate", ["advanced.enable_moe=true", "moe.router_bias_rate=0.01"]),
        ("layer_frequency", ["advanced.enable_moe=true", "moe.layer_frequency=2"]),
        ("sliding_window", ["model.sliding_window=8"]),
    ],
)
@pytest.mark.parametrize("format_name", ["gguf", "gguf_int8"])
def test_architecture_that_llama_cpp_lacks_is_refused(tiny_config, format_name, part, overrides):
    config = override_config(tiny_config, [*overrides, f"export.formats=[huggingface, {format_name}]"])
    with pytest.raises(ConfigError, match=part):
        check_formats(config)


def test_plan_refuses_the_format_before_anything_is_trained():
    with pytest.raises(ConfigError, match="enable_dre"):
        plan_workflow("production", "tiny", overrides=["export.formats=[gguf]"])
    plan = plan_workflow("production", "tiny", overrides=["export.formats=[onnx]"])
    assert plan["export"].config.export.formats == ["onnx"]
    assert plan["rlhf"].config.export.formats == ["huggingface"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python (make llama)")
@pytest.mark.parametrize("overrides", [[], MIXTURE], ids=["dense", "experts"])
@torch.no_grad()
def test_llama_cpp_computes_the_models_logits(make_run, tmp_path, overrides):
    import llama_cpp

    folder = make_run("run", overrides=[*overrides, "model.initializer_range=0.2"])
    model = load_model(folder).eval()
    write_gguf(folder, model.config, tmp_path / "model.gguf")
    llama = llama_cpp.Llama(
        str(tmp_path / "model.gguf"),
        n_ctx=0,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    tokens = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    llama.eval(tokens[0].tolist())
    expected = model(tokens).logits[0]
    # Sums in another order in float32, as between any two libraries; the logits go up to about 5.
    torch.testing.assert_close(torch.from_numpy(llama.scores[:20]), expected, atol=2e-3, rtol=1e-3)
    from transformers import AutoTokenizer

    text = "The state of the union: 1,234 people's  words,\n\n don't—naïve 東京!"
    assert llama.tokenize(text.encode(), add_bos=False) == AutoTokenizer.from_pretrained(folder)(text).input_ids
    llama.close()
