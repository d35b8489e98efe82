"""The section that says what an export holds, and what its card reckons with."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from ultrathink_model.config.section import Section
from ultrathink_model.errors import ConfigError

if TYPE_CHECKING:
    from ultrathink_model.config.root import Config

ExportFormat = Literal["huggingface", "gguf", "gguf_int8", "onnx", "onnx_int8"]


class ExportConfig(Section):
    """The exported model: its formats, and the figures of its card that no run measures."""

    formats: list[ExportFormat] = Field(
        ["huggingface"],
        description="Formats of the export. The folder itself is `huggingface`, asked for or not; `gguf` (for llama.cpp) and `onnx` (for onnxruntime) lie in it, in float32 or with int8 weights, whose loss is measured beside the full model's.",
    )
    loss_tokens: int = Field(
        8192, ge=1, description="Held-out tokens on which the loss of int8 weights is measured, in whole sequences."
    )
    licence: str | None = Field(
        None,
        description="Licence of the weights on the model card, by the Hub's names (`apache-2.0`); null says none was chosen.",
    )
    device_watts: float | None = Field(
        None, gt=0, description="Power of one device in training, for the card's carbon; null takes the data sheet's."
    )
    device_price: float | None = Field(
        None,
        ge=0,
        description="US dollars an hour of one device, for the card's cost; null takes the list price of the device.",
    )
    carbon_intensity: float = Field(
        0.473, ge=0, description="Kilograms of CO2 equivalent per kWh; the default is the world's mean of 2024 (Ember)."
    )

    @field_validator("formats")
    @classmethod
    def _formats_come_once(cls, formats: list[ExportFormat]) -> list[ExportFormat]:
        if len(set(formats)) < len(formats):
            raise ValueError(f"{formats} names a format twice; name each once")
        return formats


def check_formats(config: "Config") -> None:
    """Refuses a format that has no place for the model's architecture.

    Raises:
        ConfigError: There is such a format among `export.formats`.
    """
    missing = {
        "gguf": ("llama.cpp", _missing_in_llama_cpp(config)),
        "onnx": ("the ONNX graph", _missing_in_onnx(config)),
    }
    for name in config.export.formats:
        runtime, part = missing.get(name.removesuffix("_int8"), ("", None))
        if part:
            raise ConfigError(
                f"export.formats holds {name}, but {runtime} has no place for {part}; leave it out, or train without that part."
            )


def _missing_in_llama_cpp(config: "Config") -> str | None:
    """What the model has beyond llama.cpp's `qwen3` and `qwen3moe`."""
    model, moe = config.model, config.moe
    mixture = config.advanced.enable_moe
    parts = {
        "the reasoning engine (advanced.enable_dre)": config.advanced.enable_dre,
        "the harm head (advanced.enable_constitutional)": config.advanced.enable_constitutional,
        "images and sound (advanced.enable_multimodal)": config.advanced.enable_multimodal,
        "a bias on the choice of experts (moe.router_bias_rate)": mixture and moe.router_bias_rate > 0,
        f"experts in one block of {moe.layer_frequency} (moe.layer_frequency)": mixture and moe.layer_frequency > 1,
        f"a window of {model.sliding_window} (model.sliding_window)": model.sliding_window is not None
        and model.sliding_window < model.max_seq_length,
    }
    return next((name for name, is_there in parts.items() if is_there), None)


def _missing_in_onnx(config: "Config") -> str | None:
    return "images and sound (advanced.enable_multimodal)" if config.advanced.enable_multimodal else None
