"""Loads a safetensors checkpoint into a decoder: checks every tensor and maps it to a weight.

Every mismatch is an error: a missing, unexpected or repeated tensor, a wrong shape or dtype, a
truncated file. All of these are found before the decoder allocates memory. arch/names.py gives the
names; read.py reads the data.

The safetensors library is not used, for two reasons: it maps files into memory, so truncating a
file kills the process; and it does not tell the offset of a tensor in the file.
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
from gllm_engine.arch.names import (
    checkpoint_name,
    checkpoint_shapes,
    checkpoint_tensors,
    is_left_over,
)
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
    """The open files of a checkpoint that has exactly the tensors that its model needs."""

    path: Path
    tensors: dict[str, TensorSlice]  # by checkpoint tensor name; each is contiguous
    tied: str | None  # name of a stored output projection, which must equal the embedding


@dataclass(frozen=True)
class _Stored:
    """A tensor's entry in a file's header. `begin`, `end`: byte offsets in the data section."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


@contextmanager
def open_checkpoint(arch: Model, path: Path) -> Iterator[Checkpoint]:
    """Open the checkpoint in the directory `path`; its files stay open while the block runs.

    Raises LoadError for every mismatch that the files' headers show, before memory is allocated.
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
def filling(decoder: Decoder, checkpoint: Checkpoint, shows: bool = True) -> Iterator[None]:
    """Load the checkpoint's weights into the decoder while the block runs; at its end, wait.

    `shows`: whether to show the progress, as a bar on a terminal or in the log.

    On a GPU the block may compute with the decoder. The results are meaningless but finite, because
    weights not yet read are zero. Raises LoadError for a file that cannot be read or is truncated,
    or a stored output projection that differs from the tied embedding.
    """
    targets, tied_copy = _aim(decoder, checkpoint)
    if decoder.device.type == "cuda":
        for weight in decoder.weights().values():
            weight.zero_()
    with reading(targets, decoder.device, shows):
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
    """Fill the decoder with random weights, always the same ones for the same decoder.

    The weights are as large as a trained model's, so that activations stay in range. They are not
    constant, because kernels run faster on zeros.
    """
    generator = torch.Generator(decoder.device).manual_seed(0)
    for name, view in decoder.weights().items():
        if name.endswith("norm.weight"):
            view.uniform_(0.5, 1.5, generator=generator)
        else:
            view.normal_(0, 0.02, generator=generator)


class _Finder:
    """Checks each checkpoint tensor and records its position in the files."""

    def __init__(self, arch: Model) -> None:
        self.found: dict[str, TensorSlice] = {}
        self.tied_copy: str | None = None
        self._arch = arch
        self._wanted = checkpoint_shapes(arch)
        self._missing = dict.fromkeys(self._wanted)
        self._tied = checkpoint_name(arch, "lm_head.weight") if arch.tie else None
        if self._tied is not None:  # may be stored, if equal to the embedding
            self._wanted[self._tied] = arch.weights()["model.embed_tokens.weight"]

    def take(self, file: Path, name: str, stored: _Stored, descriptor: int, start: int) -> None:
        """Check and record one tensor. `start`: offset of the file's data section, in bytes."""
        if is_left_over(self._arch, name):
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
    """The tensor's dtype. Raises LoadError for a wrong shape or size or an unsupported dtype."""
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
    """(source, target) for each read of this rank, and the host tensor for a tied tensor's copy.

    The copy is compared with the embedding. It is on the host, so it takes no device memory.
    """
    arch = decoder.arch
    shapes = arch.weights()
    weights = decoder.weights()
    targets = []
    for name, parts in checkpoint_tensors(arch).items():
        source = checkpoint.tensors[name]
        for part in parts:
            shape = shapes[part]
            if part in weights:  # else another rank holds it
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
    """The source slice and target view of this rank's shard of the weight `whole` of shape `shape`.

    `into`: has the shard's shape, which is smaller in at most one dimension. It may have one more
    leading dimension, for copies of the shard.
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
    """The header's tensor entries by name, and the byte offset of the data section.

    A file holds the header's length in 8 bytes, the header in JSON, then the data without gaps.
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
    """The checkpoint's files without duplicates, in the order of the index."""
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
        # The index may only name files in the checkpoint's own directory.
        if name != os.path.basename(name) or not os.path.isfile(path / name):
            raise LoadError(f"{index}: names {shown(name)}, which is not a file in {path}")
    return [path / name for name in dict.fromkeys(names)]
