"""Weights on disk: safetensors files with the index that `transformers` reads, and nothing pickled."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ultrathink_model.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A file is put together in memory before it is written, so its size bounds what saving takes beside the model.
FILE_BYTES = 4 << 30
PICKLED_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, file_bytes: int = FILE_BYTES) -> None:
    """Writes the weights to `model.safetensors`, or to several files and an index where they pass `file_bytes`.

    Args:
        weights: Name and tensor, one after the other: only those of one file are held on the CPU at a time.
        folder: An existing folder.
        file_bytes: Greatest size of one file, a single larger tensor aside.
    """
    files: list[dict[str, int]] = []
    for number, tensors in enumerate(_in_files(weights, file_bytes), start=1):
        save_file(tensors, folder / _draft_name(number), metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in tensors.items()})
    if len(files) == 1:
        (folder / _draft_name(1)).rename(folder / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        (folder / _draft_name(number)).rename(folder / name)
        weight_map |= dict.fromkeys(sizes, name)
    total = sum(size for sizes in files for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _draft_name(number: int) -> str:
    return f"draft-{number}.safetensors"


def _in_files(weights: Iterable[tuple[str, Tensor]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        if tensors and size + weight.nbytes > file_bytes:
            yield tensors
            tensors, size = {}, 0
        tensors[name] = weight.detach().cpu().contiguous()
        size += weight.nbytes
    yield tensors


class WeightFiles(Mapping[str, Tensor]):
    """The weights of a model folder by name, each read from its file when it is asked for.

    Args:
        folder: The model folder.

    Raises:
        CheckpointError: The folder holds no safetensors, a file of its index is missing, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        self._read: set[str] = set()
        for name in _weight_files(folder):
            file = _open(folder / name)
            self._files[name] = file
            self._file_of |= dict.fromkeys(file.keys(), name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise CheckpointError(
                f"{self._folder}: its safetensors hold no weight {name}, which its config asks for; "
                "save or download the model again."
            )
        self._read.add(name)
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        return tensor

    @property
    def unread(self) -> list[str]:
        """Names of the weights that nobody has asked for yet."""
        return [name for name in self if name not in self._read]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of weights: {error!r}; save the model again.") from None
    elif (folder / WEIGHTS_FILE).is_file():
        names = [WEIGHTS_FILE]
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
        found = f"; {', '.join(pickled)} may hold code and is not read" if pickled else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}{found}. Save the model as safetensors.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {INDEX_FILE} names {', '.join(missing)}, which is not there; copy it again.")
    return names


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; save or copy it again.") from None
