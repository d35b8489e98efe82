"""Loads an exported model as a stranger would: run as a script in a process of its own, with no code of this package.

Usage: python -I load_check.py FOLDER PROBE LOGITS, where PROBE is a safetensors file of token ids (1, seq) under
`tokens`, and LOGITS the file that gets what the model predicts after each, (1, seq, vocab), under `logits`.
"""

import json
import sys
from pathlib import Path

NEW_TOKENS = 4


def main(folder: str, probe: str, logits_file: str) -> None:
    """Writes the model's logits for the probe, after the tokenizer and generation have worked too."""
    # The check must fail for a folder that only loads where this package is installed.
    sys.modules["ultrathink_model"] = None  # type: ignore[assignment]

    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    carries_code = "auto_map" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=carries_code)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=carries_code, dtype=torch.float32).eval()
    tokens = load_file(probe)["tokens"]
    with torch.no_grad():
        save_file({"logits": model(tokens).logits.contiguous()}, logits_file)
    prompt = tokenizer("The state of the", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    tokenizer.decode(text[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
