"""From a safetensors checkpoint to a decoder: what goes where, and whether all of it fits.

Everything that does not fit exactly is an error: missing, left over, twice, another shape, another
kind of number, a file cut short. Names come from arch/names.py; read.py moves the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gllm_engine.arch.names import checkpoint_name, checkpoint_tensors, is_left_over
from gllm_engine.model.decoder import Decoder
from gllm_engine.model.read import LoadError, TensorSlice, reading

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@contextmanager
def filling(decoder: Decoder, path: Path) -> Iterator[None]:
    """Fill the decoder from the checkpoint in `path` while the block runs, and wait for the rest.

    On a GPU the block may compute with the decoder. The results mean nothing, but are finite:
    weights that have not come yet are zero. Raises LoadError: before the block for what the files'
    headers tell, at its end for what only reading them can tell.
    """
    loader = _Loader(decoder)
    with ExitStack() as opened:
        for place in _files(path):
            file = opened.enter_context(_open(place))
            for name, stored, offset in _tensors(place, file):
                loader.take(place, name, stored, file.fileno(), offset)
        loader.check_complete(path)
        if decoder.device.type == "cuda":
            for weight in decoder.weights().values():
                weight.zero_()
        with reading(loader.targets, decoder.device):
            yield
    loader.check_tied()


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


class _Loader:
    """Checks each checkpoint tensor and says where its numbers go."""

    def __init__(self, decoder: Decoder) -> None:
        arch = decoder.arch
        self.targets: list[tuple[TensorSlice, Tensor]] = []
        self._shard = decoder.shard
        self._shapes, self._weights = arch.weights(), decoder.weights()
        self._missing = checkpoint_tensors(arch)
        self._seen: set[str] = set()
        # A tied model's checkpoint may carry its output projection too, if it is the embedding.
        self._tied = checkpoint_name(arch, "lm_head.weight") if arch.tie else None
        self._tied_copy: tuple[Path, Tensor] | None = None

    def take(self, file: Path, name: str, stored: Any, descriptor: int, offset: int) -> None:
        """`stored`: a safetensors slice, whose numbers are at `offset` of the open file."""
        if is_left_over(name):
            return
        if name in self._seen:
            raise LoadError(f"{file}: tensor {name} is in the checkpoint twice")
        self._seen.add(name)
        if name == self._tied:
            embedding = self._weights.get("model.embed_tokens.weight")
            shape = self._shapes["model.embed_tokens.weight"]
            dtype = _check(file, name, stored, shape)
            if embedding is not None:
                # On the host: to be compared, not to take the device's memory.
                self._tied_copy = file, torch.empty_like(embedding, device="cpu")
                self._aim(TensorSlice(file, descriptor, offset, dtype), shape, self._tied_copy[1])
            return
        if name not in self._missing:
            raise LoadError(f"{file}: tensor {name} is left over; the model has no place for it")
        parts = self._missing.pop(name)
        shapes = [self._shapes[part] for part in parts]
        rows = sum(shape[0] for shape in shapes)
        dtype = _check(file, name, stored, (rows, *shapes[0][1:]))
        for part, shape in zip(parts, shapes, strict=True):
            if part in self._weights:  # else it is another rank's
                self._aim(TensorSlice(file, descriptor, offset, dtype), shape, self._weights[part])
            offset += prod(shape) * dtype.itemsize

    def _aim(self, whole: TensorSlice, shape: tuple[int, ...], into: Tensor) -> None:
        """Have this rank's share of a whole weight of `shape` read. `into`: of the share's shape,
        which is smaller in one dimension at most; or the same once more for each of some copies.
        """
        width = prod(shape[1:])
        shard = into.shape[-len(shape) :]
        count, start = prod(shard[1:]), self._shard.start
        offset = whole.offset + start(shape[0], shard[0]) * width * whole.dtype.itemsize
        source = replace(whole, offset=offset)
        if count < width:
            source = replace(source, width=width, first=start(width, count), count=count)
        self.targets.append((source, into.view(-1, prod(shard))))

    def check_complete(self, path: Path) -> None:
        if self._missing:
            name = next(iter(self._missing))
            more = f" (and {len(self._missing) - 1} more)" if len(self._missing) > 1 else ""
            raise LoadError(f"{path}: tensor {name} is missing{more}")

    def check_tied(self) -> None:
        """After reading."""
        if self._tied_copy is not None:
            file, copy = self._tied_copy
            if not torch.equal(copy, self._weights["model.embed_tokens.weight"].cpu()):
                raise LoadError(
                    f"{file}: tensor {self._tied} differs from the embedding, but the config says "
                    "tie_word_embeddings=true"
                )


def _check(file: Path, name: str, stored: Any, shape: tuple[int, ...]) -> torch.dtype:
    """The tensor's kind of number, if it is as it must be."""
    found = tuple(stored.get_shape())
    if found != shape:
        raise LoadError(
            f"{file}: tensor {name} has shape {list(found)}, the config asks for {list(shape)}"
        )
    if stored.get_dtype() not in _DTYPES:
        raise LoadError(
            f"{file}: tensor {name} has dtype {stored.get_dtype()}; supported: {', '.join(_DTYPES)}"
        )
    return _DTYPES[stored.get_dtype()]


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise LoadError(f"{file}: cannot be read ({error.strerror})") from None


def _tensors(file: Path, opened: BinaryIO) -> Iterator[tuple[str, Any, int]]:
    """Each tensor's name, its safetensors slice, and the offset in the file of its first byte."""
    try:
        with safe_open(file, framework="pt") as checked:
            # The library has compared the header with the file's length, and each tensor's bytes
            # with its shape; only it does not tell where they are.
            header_len = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_len))
            for name in checked.keys():  # noqa: SIM118 - not a dict
                offset = 8 + header_len + header[name]["data_offsets"][0]
                yield name, checked.get_slice(name), offset
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise LoadError(f"{file}: not a complete safetensors file ({error})") from None


def _files(path: Path) -> list[Path]:
    """The checkpoint's files, each once, in the order of the index."""
    index = path / _INDEX
    if not index.exists():
        if not (path / _SINGLE).exists():
            raise LoadError(f"{path}: neither {_SINGLE} nor {_INDEX} is there")
        return [path / _SINGLE]
    try:
        files = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = [path / name for name in files]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: not a safetensors index ({error!r})") from None
    for file in paths:
        if file.parent != path or not file.exists():
            raise LoadError(f"{index}: names {file.name}, which is not a file in {path}")
    return paths
