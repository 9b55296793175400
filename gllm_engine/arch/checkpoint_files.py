"""The files of a safetensors checkpoint, as far as their index and headers tell: no numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from gllm_engine.arch.fields import LoadError
from gllm_engine.files import open_file, parse_object, read_object, shown

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def checkpoint_files(path: Path) -> list[Path]:
    """The checkpoint's files without duplicates, in the order of the index. Raises LoadError."""
    files = _weight_map(path)
    names = [_SINGLE] if files is None else dict.fromkeys(files.values())
    return [path / name for name in names]


def tensor_names(path: Path) -> set[str]:
    """The names of all tensors, as the index or the only file tells. Raises LoadError."""
    files = _weight_map(path)
    if files is not None:
        return set(files)
    with open_file(path / _SINGLE, LoadError) as opened:
        return set(read_header(path / _SINGLE, opened)[0])


def _weight_map(path: Path) -> dict[str, str] | None:
    """Tensor name -> its file; None: there is no index, and one file."""
    index = path / _INDEX
    if not os.path.lexists(index):
        if not os.path.lexists(path / _SINGLE):
            raise LoadError(f"{path}: neither {_SINGLE} nor {_INDEX} is there")
        return None
    files = read_object(index, LoadError).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise LoadError(f"{index}: its weight_map names no file for each tensor")
    for name in dict.fromkeys(names):
        # The index may only name files in the checkpoint's own directory.
        if name != os.path.basename(name) or not os.path.isfile(path / name):
            raise LoadError(f"{index}: names {shown(name)}, which is not a file in {path}")
    return files


def incomplete(file: Path, problem: str) -> LoadError:
    return LoadError(f"{file}: not a complete safetensors file ({problem})")


def read_header(file: Path, opened: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header's entries of tensors by name, and the offset of the data. Raises LoadError.

    A file holds the header's length in 8 bytes, the header in JSON, then the data without gaps.
    """
    size = os.fstat(opened.fileno()).st_size
    try:
        length = int.from_bytes(opened.read(8), "little")
        data_start = 8 + length
        if data_start > size:
            raise incomplete(file, f"it has {size} bytes, its header alone should have {length}")
        if length > _MAX_HEADER_BYTES:
            raise incomplete(file, f"its header has {length} bytes, more than the format allows")
        header = parse_object(file, opened.read(length), LoadError)
    except OSError as error:
        raise LoadError(f"{file}: cannot be read ({error.strerror})") from None
    header.pop("__metadata__", None)
    return header, data_start
