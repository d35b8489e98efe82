"""Loads an exported file as a stranger would: run as a script in a process of its own, with no code of this package.

Usage: python -I load_check.py FORMAT PATH PROBE RESULT. PROBE is a safetensors file with token ids (1, seq) under `tokens`
and perhaps held-out rows (rows, seq + 1) under `held_out`. RESULT is the file that gets what the model predicts after each
token, (1, seq, vocab) under `logits`, and the mean loss in nats over the rows under `loss`.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW_TOKENS = 4

Predict = Callable[[Any], Any]


def main(kind: str, path: str, probe_file: str, result_file: str) -> None:
    """Writes the model's logits for the probe, and its loss on the held-out rows."""
    # The check must fail for a folder that only loads where this package is installed.
    sys.modules["ultrathink_model"] = None  # type: ignore[assignment]

    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    probe = load_file(probe_file)
    with torch.no_grad():
        predict = LOADERS[kind.removesuffix("_int8")](Path(path))
        result = {"logits": predict(probe["tokens"]).float().contiguous()}
        if "held_out" in probe:
            rows = probe["held_out"]
            losses = [torch.nn.functional.cross_entropy(predict(row[None, :-1])[0].float(), row[1:]) for row in rows]
            result["loss"] = torch.stack(losses).mean()
    save_file(result, result_file)


def load_huggingface(folder: Path) -> Predict:
    """A folder by `transformers`, once its tokenizer, its chat template and generation have worked, too."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    carries_code = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=carries_code)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=carries_code, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": "The state of the"}]
    prompt = tokenizer(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), return_tensors="pt"
    )
    text = model.generate(**prompt, max_new_tokens=NEW_TOKENS)
    tokenizer.decode(text[0])
    if (folder / "processor_config.json").is_file():
        _look_and_listen(folder, model)
    return lambda tokens: model(tokens).logits


def _look_and_listen(folder: Path, model: Any) -> None:
    """Has the model write after an image and a sound that its processor has read."""
    import numpy  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415
    from transformers import AutoProcessor  # noqa: PLC0415

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tone = numpy.sin(numpy.arange(processor.multimodal["audio_sample_rate"] // 4) / 10).astype(numpy.float32)
    inputs = processor("<image> and <audio> are", images=Image.new("RGB", (64, 48), "green"), audio=tone)
    processor.decode(model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0])


def load_gguf(path: Path) -> Predict:
    """A GGUF file by llama.cpp, or, where `llama-cpp-python` is not installed, read back into `transformers`' class.

    The class is built from the `config.json` of the export, in which GGUF files lie in a folder of their own.
    """
    return _run_llama(path) if importlib.util.find_spec("llama_cpp") else _read_back(path)


def _run_llama(path: Path) -> Predict:
    import llama_cpp  # noqa: PLC0415
    import torch  # noqa: PLC0415

    # Keys and values in float32: llama.cpp's usual float16 would hide a small fault behind its rounding.
    model = llama_cpp.Llama(
        str(path),
        n_ctx=0,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )

    def predict(tokens: Any) -> Any:
        model.reset()
        model.eval(tokens[0].tolist())
        return torch.from_numpy(model.scores[: tokens.shape[1]].copy())[None]

    return predict


def _read_back(path: Path) -> Predict:
    import gguf  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    values = {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors
    }
    config = AutoConfig.from_pretrained(path.parent.parent)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    kind = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    state = {}
    for name in model.state_dict():
        theirs = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            state[name] = torch.cat(
                [values.pop(f"blk.{block}.ffn_{part}_exps.weight") for part in ("gate", "up")], dim=1
            )
        elif not (name == "lm_head.weight" and config.tie_word_embeddings):
            state[name] = values.pop(theirs)
    if values:
        raise ValueError(f"{path.name} holds weights that the model has no place for: {', '.join(values)}")
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    return lambda tokens: model(tokens).logits


def load_onnx(path: Path) -> Predict:
    """An ONNX graph by onnxruntime, on the processor."""
    import onnxruntime  # noqa: PLC0415
    import torch  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda tokens: torch.from_numpy(session.run(["logits"], {"input_ids": tokens.numpy()})[0])


LOADERS: dict[str, Callable[[Path], Predict]] = {
    "huggingface": load_huggingface,
    "gguf": load_gguf,
    "onnx": load_onnx,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
