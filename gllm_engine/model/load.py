"""From a safetensors checkpoint to a decoder: what goes where, and whether all of it fits.

Everything that does not fit exactly is an error: missing, left over, twice, another shape, another
kind of number, a file cut short. All of it is known before a decoder takes memory. Names come from
arch/names.py; read.py moves the numbers.

The safetensors library is not used: it maps a file into memory, and a process whose mapped file is
cut short meanwhile is killed; nor does it tell where in the file a tensor is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gllm_engine.arch.model import Model
from gllm_engine.arch.names import checkpoint_name, checkpoint_tensors, is_left_over
from gllm_engine.files import open_file, parse_object, read_object, shown
from gllm_engine.model.decoder import Decoder
from gllm_engine.model.read import LoadError, TensorSlice, reading

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Checkpoint:
    """The open files of a checkpoint that has exactly the tensors its model asks for."""

    path: Path
    tensors: dict[str, TensorSlice]  # by the checkpoint's name; numbers in a row
    tied: str | None  # a tensor that must equal the embedding


@dataclass(frozen=True)
class _Stored:
    """What a file's header says of a tensor; `begin` and `end` in bytes, in the file's data."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


@contextmanager
def open_checkpoint(arch: Model, path: Path) -> Iterator[Checkpoint]:
    """Open the checkpoint in `path`; its files stay open while the block runs.

    Raises LoadError for all that the files' headers tell: then no memory has been taken.
    """
    finder = _Finder(arch)
    with ExitStack() as opened:
        for place in _files(path):
            file = opened.enter_context(open_file(place, LoadError))
            header, data_start = _read_header(place, file)
            for name, stored in header.items():
                finder.take(place, name, stored, file.fileno(), data_start)
        finder.check_complete(path)
        yield Checkpoint(path, finder.found, finder.tied_copy)


@contextmanager
def filling(decoder: Decoder, checkpoint: Checkpoint) -> Iterator[None]:
    """Fill the decoder from its model's checkpoint while the block runs, and wait for the rest.

    On a GPU the block may compute with the decoder. The results mean nothing, but are finite:
    weights that have not come yet are zero. Raises LoadError for what only reading can tell.
    """
    targets, tied_copy = _aim(decoder, checkpoint)
    if decoder.device.type == "cuda":
        for weight in decoder.weights().values():
            weight.zero_()
    with reading(targets, decoder.device):
        yield
    if tied_copy is not None:
        embedding = decoder.weights()["model.embed_tokens.weight"].cpu()
        if not torch.equal(tied_copy, embedding):
            file = checkpoint.tensors[str(checkpoint.tied)].path
            raise LoadError(
                f"{file}: tensor {checkpoint.tied} differs from the embedding, but the config says "
                "tie_word_embeddings=true"
            )


def fill_randomly(decoder: Decoder) -> None:
    """Random weights, for the same decoder always the same.

    They are of a trained model's size, so that numbers stay in range, and none is constant:
    kernels run faster on zeros.
    """
    generator = torch.Generator(decoder.device).manual_seed(0)
    for name, view in decoder.weights().items():
        if name.endswith("norm.weight"):
            view.uniform_(0.5, 1.5, generator=generator)
        else:
            view.normal_(0, 0.02, generator=generator)


class _Finder:
    """Checks each checkpoint tensor and keeps where its numbers are."""

    def __init__(self, arch: Model) -> None:
        self.found: dict[str, TensorSlice] = {}
        self.tied_copy: str | None = None
        shapes = arch.weights()
        self._wanted: dict[str, tuple[int, ...]] = {}
        for name, parts in checkpoint_tensors(arch).items():
            rows = sum(shapes[part][0] for part in parts)
            self._wanted[name] = (rows, *shapes[parts[0]][1:])
        self._missing = dict.fromkeys(self._wanted)
        self._tied = checkpoint_name(arch, "lm_head.weight") if arch.tie else None
        if self._tied is not None:  # it may be there too, if it is the embedding
            self._wanted[self._tied] = shapes["model.embed_tokens.weight"]

    def take(self, file: Path, name: str, stored: _Stored, descriptor: int, start: int) -> None:
        """`start`: of the data in the open file, in bytes."""
        if is_left_over(name):
            return
        if name in self.found:
            raise LoadError(f"{file}: tensor {name} is in the checkpoint twice")
        if name not in self._wanted:
            raise LoadError(
                f"{file}: tensor {shown(name)} is left over; the model has no place for it"
            )
        dtype = _check(file, name, stored, self._wanted[name])
        self.found[name] = TensorSlice(file, descriptor, start + stored.begin, dtype)
        self._missing.pop(name, None)
        if name == self._tied:
            self.tied_copy = name

    def check_complete(self, path: Path) -> None:
        if self._missing:
            name = next(iter(self._missing))
            more = f" (and {len(self._missing) - 1} more)" if len(self._missing) > 1 else ""
            raise LoadError(f"{path}: tensor {name} is missing{more}")


def _check(file: Path, name: str, stored: _Stored, shape: tuple[int, ...]) -> torch.dtype:
    """The tensor's kind of number, if it is as it must be."""
    if tuple(stored.shape) != shape:
        raise LoadError(
            f"{file}: tensor {name} has shape {shown(repr(stored.shape))}, "
            f"the config asks for {list(shape)}"
        )
    if stored.dtype not in _DTYPES:
        raise LoadError(
            f"{file}: tensor {name} has dtype {shown(stored.dtype)}; "
            f"supported: {', '.join(_DTYPES)}"
        )
    dtype = _DTYPES[stored.dtype]
    num_bytes = prod(shape) * dtype.itemsize
    if stored.end - stored.begin != num_bytes:
        raise _incomplete(
            file, f"tensor {name} has {stored.end - stored.begin} bytes, its shape {num_bytes}"
        )
    return dtype


def _aim(
    decoder: Decoder, checkpoint: Checkpoint
) -> tuple[list[tuple[TensorSlice, Tensor]], Tensor | None]:
    """Which numbers go into which memory of the decoder; and a tied tensor's copy, to be compared.

    The copy is on the host, so that it takes none of the device's memory.
    """
    arch = decoder.arch
    shapes = arch.weights()
    weights = decoder.weights()
    targets = []
    for name, parts in checkpoint_tensors(arch).items():
        source = checkpoint.tensors[name]
        for part in parts:
            shape = shapes[part]
            if part in weights:  # else it is another rank's
                targets.append(_share(decoder, source, shape, weights[part]))
            num_bytes = prod(shape) * source.dtype.itemsize
            source = replace(source, offset=source.offset + num_bytes)
    embedding = weights.get("model.embed_tokens.weight")
    if checkpoint.tied is None or embedding is None:
        return targets, None
    copy = torch.empty_like(embedding, device="cpu")
    shape = shapes["model.embed_tokens.weight"]
    source = checkpoint.tensors[checkpoint.tied]
    return [*targets, _share(decoder, source, shape, copy)], copy


def _share(
    decoder: Decoder, whole: TensorSlice, shape: tuple[int, ...], into: Tensor
) -> tuple[TensorSlice, Tensor]:
    """What this rank reads of a whole weight of `shape`. `into`: of the share's shape, which is
    smaller in one dimension at most; or the same once more for each of some copies.
    """
    width = prod(shape[1:])
    shard = into.shape[-len(shape) :]
    count = prod(shard[1:])
    start = decoder.shard.start
    offset = whole.offset + start(shape[0], shard[0]) * width * whole.dtype.itemsize
    source = replace(whole, offset=offset)
    if count < width:
        source = replace(source, width=width, first=start(width, count), count=count)
    return source, into.view(-1, prod(shard))


def _read_header(file: Path, opened: BinaryIO) -> tuple[dict[str, _Stored], int]:
    """What the file says of its tensors, and where in it their data begins.

    A file is 8 bytes with the header's length, the header in JSON, the data without a gap.
    """
    size = os.fstat(opened.fileno()).st_size
    try:
        length = int.from_bytes(opened.read(8), "little")
        data_start = 8 + length
        if data_start > size:
            raise _incomplete(file, f"it has {size} bytes, its header alone should have {length}")
        if length > _MAX_HEADER_BYTES:
            raise _incomplete(file, f"its header has {length} bytes, more than the format allows")
        header = parse_object(file, opened.read(length), LoadError)
    except OSError as error:
        raise LoadError(f"{file}: cannot be read ({error.strerror})") from None
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, about) for name, about in header.items()}
    end = 0
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != end or stored.end < end:
            raise _incomplete(file, f"tensor {shown(name)} does not begin where another ends")
        end = stored.end
    if data_start + end != size:
        raise _incomplete(file, f"it has {size} bytes, its tensors end at byte {data_start + end}")
    return tensors, data_start


def _stored(file: Path, name: str, about: Any) -> _Stored:
    match about:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
        } if all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            return _Stored(dtype, shape, begin, end)
    raise _incomplete(file, f"tensor {shown(name)} is described as {shown(repr(about))}")


def _incomplete(file: Path, problem: str) -> LoadError:
    return LoadError(f"{file}: not a complete safetensors file ({problem})")


def _files(path: Path) -> list[Path]:
    """The checkpoint's files, each once, in the order of the index."""
    index = path / _INDEX
    if not os.path.lexists(index):
        if not os.path.lexists(path / _SINGLE):
            raise LoadError(f"{path}: neither {_SINGLE} nor {_INDEX} is there")
        return [path / _SINGLE]
    weight_map = read_object(index, LoadError).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise LoadError(f"{index}: its weight_map names no file for each tensor")
    for name in dict.fromkeys(names):
        # Nothing outside the directory, whatever is there, is a part of the checkpoint.
        if name != os.path.basename(name) or not os.path.isfile(path / name):
            raise LoadError(f"{index}: names {shown(name)}, which is not a file in {path}")
    return [path / name for name in dict.fromkeys(names)]
