"""Weight files of a checkpoint: `torch.save` or safetensors, one file or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .sam_checkpoint import load_pickle

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype


def list_tensors(source: Path) -> dict[str, TensorInfo]:
    """
    All tensors of a checkpoint by name, in the order of its files; no values are read.

    Args:
        source: A folder with `pytorch_model*.bin` or `model*.safetensors` (with an index if sharded), or such a file.

    Raises:
        FileNotFoundError: there are no weight files, or one that the index names is missing.
        ValueError: a file cannot be read as plain tensors, or the index and the files contradict each other.
    """
    if source.is_file():
        return dict(_infos(source))
    for index in INDEXES:
        if (source / index).is_file():
            return _sharded(source, index)
    for name in SINGLE_FILES:
        if (source / name).is_file():
            return dict(_infos(source / name))
    raise FileNotFoundError(f"{source} holds no weights: expected one of {', '.join([*SINGLE_FILES, *INDEXES])}")


def _sharded(folder: Path, index: str) -> dict[str, TensorInfo]:
    try:
        placed = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(placed.values()))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / index} is no index of weight files: it needs a 'weight_map'") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in files):
        raise ValueError(f"{folder / index} names files outside of its folder: {', '.join(map(str, files[:5]))}")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} weight files are missing in {folder}: {', '.join(missing[:5])}; download them"
        )
    found = {name: info for file in files for name, info in _infos(folder / file)}
    astray = [name for name, info in found.items() if placed.get(name) != info.file.name]
    absent = [name for name in placed if name not in found]
    if astray or absent:
        raise ValueError(
            f"{folder / index} does not fit its files: {len(astray)} tensors are elsewhere or not listed "
            f"({', '.join(astray[:3])}), {len(absent)} are in no file ({', '.join(absent[:3])}); download it again"
        )
    return found


def _infos(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    yield name, TensorInfo(file, torch.Size(part.get_shape()), DTYPES[part.get_dtype()])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file} is damaged or holds unknown types: {error}; download it again") from error
        return
    state = load_pickle(file)
    foreign = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise ValueError(
            f"{file} is not a flat dictionary of tensors: {len(foreign)} of {len(state)} entries are something else "
            f"({', '.join(foreign[:5])}); a DeepSpeed checkpoint is consolidated by its own zero_to_fp32.py first"
        )
    for name, tensor in state.items():
        yield name, TensorInfo(file, tensor.shape, tensor.dtype)


@contextmanager
def open_tensors(file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that gives the tensors of one file by name, mapped into memory: read when used, freed at the end."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            yield tensors.get_tensor
        return
    yield load_pickle(file).__getitem__
