"""The modelling code of a model folder: our own modules, rewritten to stand alone beside the weights.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then needs PyTorch and `transformers` only. The
files are copies with other imports, so that what a folder computes is what was trained.
"""

import ast
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "ultrathink_model"
MODELLING_MODULE = "modeling_ultrathink"
CONFIGURATION_MODULE = "configuration_ultrathink"
PROCESSING_MODULE = "processing_ultrathink"
PROCESSOR_CLASS = "UltrathinkProcessor"
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION_MODULE}.UltrathinkConfig",
    "AutoModelForCausalLM": f"{MODELLING_MODULE}.UltrathinkForCausalLM",
}
MEDIA_AUTO_MAP = {
    "AutoModelForImageTextToText": f"{MODELLING_MODULE}.UltrathinkForCausalLM",
    "AutoProcessor": f"{PROCESSING_MODULE}.{PROCESSOR_CLASS}",
}
# Stands in for jaxtyping and for our config in annotations; at run time the config is `UltrathinkConfig.sections()`.
ANNOTATIONS_MODULE = "annotations_ultrathink"
ANNOTATIONS = '''"""Names that the other files use in annotations only."""

from typing import Any

Config = MultimodalConfig = Any
ReasoningPath = str


class _Shaped:
    """An annotated tensor; its shape is for the reader."""

    def __class_getitem__(cls, item: Any) -> Any:
        return item[0]


Bool = Float = Float32 = Int = UInt8 = _Shaped
'''
# What is copied: the modules of these packages that the modelling module imports, beside each other under flat names.
OWN_IMPORT = re.compile(r"^from ultrathink_model\.((?:(?:models|media)\.[\w.]+)|errors) import", re.MULTILINE)
ANNOTATIONS_IMPORT = re.compile(r"^from (?:jaxtyping|ultrathink_model\.config(?:\.\w+)*) import", re.MULTILINE)


def write_modelling_code(folder: Path, with_processor: bool) -> None:
    """Writes `modeling_ultrathink.py`, and the processor for media, with all that they import to the folder."""
    (folder / f"{ANNOTATIONS_MODULE}.py").write_text(ANNOTATIONS, encoding="utf-8")
    for module in _modules([MODELLING_MODULE, PROCESSING_MODULE] if with_processor else [MODELLING_MODULE]):
        (folder / f"{_flat(module)}.py").write_text(_standing_alone(_source(module)), encoding="utf-8")


def _modules(first: Sequence[str]) -> list[str]:
    """These modules of `models` and every module that they import, directly or not, by its path below the package."""
    found = [f"models.{module}" for module in first]
    for module in found:  # grows while it is read
        found += [name for name in dict.fromkeys(OWN_IMPORT.findall(_source(module))) if name not in found]
    return found


def _flat(module: str) -> str:
    """The name that a module has in the folder, which has no packages."""
    return module.removeprefix("models.").replace(".", "_")


def _source(module: str) -> str:
    spec = importlib.util.find_spec(f"{PACKAGE}.{module}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _standing_alone(source: str) -> str:
    """The source with imports from beside it, and without what must be registered only once in a process."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and any(
            "register_flop_formula" in ast.dump(d) for d in node.decorator_list
        ):
            start = min(decorator.lineno for decorator in node.decorator_list)
            del lines[start - 1 : node.end_lineno]
    text = "".join(lines)
    text = ANNOTATIONS_IMPORT.sub(f"from .{ANNOTATIONS_MODULE} import", text)
    text = OWN_IMPORT.sub(lambda match: f"from .{_flat(match[1])} import", text)
    assert "ultrathink_model" not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL), "an import was not rewritten"
    return text
