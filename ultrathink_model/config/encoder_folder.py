"""What the Hugging Face folder of an encoder says of its sizes, in the words of the section `multimodal`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
# What `transformers` leaves out of a folder's files, because it is its class's default.
CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP_DEFAULTS = CLIP_DEFAULTS | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
WHISPER_DEFAULTS: dict[str, Any] = {
    "num_mel_bins": 80,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "d_model": 384,
    "max_source_positions": 1500,
    "activation_function": "gelu",
    "scale_embedding": False,
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORM_EPS = {"clip": 1e-5, "siglip": 1e-6}
WHISPER_RATE = 16_000
# The convolutions leave a state for every second frame of a hundredth of a second.
STATES_PER_SECOND = 50


def with_image_encoder(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section's values with the sizes of `image_encoder`.

    Raises:
        ValueError: The folder is missing or holds no CLIP or SigLIP, or a value contradicts it.
    """
    return _with_sizes(values, "image_encoder", _image_sizes)


def with_audio_encoder(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section's values with the sizes of `audio_encoder`.

    Raises:
        ValueError: The folder is missing or holds no Whisper, or a value contradicts it.
    """
    return _with_sizes(values, "audio_encoder", _audio_sizes)


def _with_sizes(values: Mapping[str, Any], key: str, sizes_of: Any) -> dict[str, Any]:
    folder = values.get(key)
    if not isinstance(folder, str):
        return dict(values)
    kind = key.removesuffix("_encoder")
    if not (Path(folder) / FILE).is_file():
        # A resolved config names every size, and stays readable where the folder is not.
        if f"{kind}_hidden_size" in values and f"{kind}_layers" in values:
            return dict(values)
        raise ValueError(f"{key}={folder} holds no {FILE}; name a local Hugging Face folder")
    sizes, limits = sizes_of(Path(folder), key)
    for name, size in sizes.items():
        own = values.get(name)
        if own is not None and own != size and not (isinstance(own, list | tuple) and tuple(own) == size):
            raise ValueError(f"{name}={own} contradicts {key}={folder}, whose {name} is {size}; leave it out")
    for name, limit in limits.items():
        if values.get(name, 0) > limit:
            raise ValueError(f"{name}={values[name]} is more than {key}={folder} was made for; lower it to {limit}")
    return {**limits, **values, **sizes}


def _image_sizes(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = _read(folder / FILE, key)
    kind = str(whole.get("model_type", "")).removesuffix("_vision_model")
    if kind not in NORM_EPS:
        raise ValueError(f"{key}={folder} holds a model of type {whole.get('model_type')!r}; take a CLIP or a SigLIP")
    vision = (CLIP_DEFAULTS if kind == "clip" else SIGLIP_DEFAULTS) | whole.get("vision_config", whole)
    if vision["hidden_act"] not in ACTIVATIONS or vision["layer_norm_eps"] != NORM_EPS[kind]:
        raise ValueError(
            f"{key}={folder}: hidden_act={vision['hidden_act']} and layer_norm_eps={vision['layer_norm_eps']} are not "
            f"those of a published {kind}; take another folder"
        )
    mean, std = (CLIP_MEAN, CLIP_STD) if kind == "clip" else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    preprocessor = folder / PREPROCESSOR_FILE
    pixels = _read(preprocessor, key) if preprocessor.is_file() else {}
    sizes = {
        "image_architecture": kind,
        "image_hidden_size": vision["hidden_size"],
        "image_layers": vision["num_hidden_layers"],
        "image_heads": vision["num_attention_heads"],
        "image_intermediate_size": vision["intermediate_size"],
        "image_activation": ACTIVATIONS[vision["hidden_act"]],
        "patch_size": vision["patch_size"],
        "image_mean": tuple(pixels.get("image_mean", mean)),
        "image_std": tuple(pixels.get("image_std", std)),
    }
    # Positions interpolate, so another size is the user's to choose.
    return sizes, {}


def _audio_sizes(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = _read(folder / FILE, key)
    if whole.get("model_type") != "whisper":
        raise ValueError(f"{key}={folder} holds a model of type {whole.get('model_type')!r}; take a Whisper")
    whisper = WHISPER_DEFAULTS | whole
    if whisper["activation_function"] != "gelu" or whisper["scale_embedding"]:
        raise ValueError(f"{key}={folder} differs from a published Whisper in activation_function or scale_embedding")
    sizes = {
        "audio_hidden_size": whisper["d_model"],
        "audio_layers": whisper["encoder_layers"],
        "audio_heads": whisper["encoder_attention_heads"],
        "audio_intermediate_size": whisper["encoder_ffn_dim"],
        "mel_bins": whisper["num_mel_bins"],
        "audio_sample_rate": WHISPER_RATE,
    }
    return sizes, {"max_audio_seconds": whisper["max_source_positions"] / STATES_PER_SECOND}


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {path} cannot be read: {error}; copy the folder again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{key}: {path} holds {type(values).__name__}, not an object; copy the folder again")  # noqa: TRY004 - for pydantic
    return values
