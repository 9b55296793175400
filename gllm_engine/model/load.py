"""Loads a safetensors checkpoint into a decoder: checks every tensor and maps it to a weight.

Every mismatch is an error: a missing, unexpected or repeated tensor, a wrong shape or dtype, a
truncated file. All of these are found before the decoder allocates memory. arch/names.py gives the
names, stored.py checks the tensors, and read.py reads the data.

The safetensors library is not used, for two reasons: it maps files into memory, so truncating a
file kills the process; and it does not tell the offset of a tensor in the file.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gllm_engine.arch import LoadError
from gllm_engine.arch.checkpoint_files import checkpoint_files, incomplete, read_header
from gllm_engine.arch.formats import Integers, format_name
from gllm_engine.arch.layout import Place, checkpoint_places
from gllm_engine.arch.model import EMBEDDING, Model
from gllm_engine.arch.names import checkpoint_tensors, with_stored_names
from gllm_engine.arch.shard import Shard
from gllm_engine.files import open_file, shown
from gllm_engine.layers import Staging
from gllm_engine.model.decoder import Decoder
from gllm_engine.model.read import TensorSlice, reading
from gllm_engine.model.stored import StoredTensor, StoredTensors, Verified
from gllm_engine.model.vision_tower import VisionTower

_STAGED_BYTES = 1 << 30  # of weights that are stored in another form; the last one may exceed it


@dataclass(frozen=True)
class Checkpoint:
    """The open files of a checkpoint that has exactly the tensors that its model needs."""

    path: Path
    arch: Model  # with the formats of the stored weights, and the variants of their names
    tensors: dict[str, TensorSlice]  # by checkpoint tensor name; each is contiguous
    shared: dict[str, int]  # see StoredTensors
    verified: dict[str, Verified]  # by checkpoint tensor name
    tied: str | None  # name of a stored output projection, which must equal the embedding


@dataclass(frozen=True)
class LoneTower:
    """The tower of a model whose decoder is elsewhere, with what the loading asks a Decoder for."""

    arch: Model
    tower: VisionTower
    device: torch.device
    shard: Shard = Shard(0, 0)  # the tower is whole

    def weights(self) -> dict[str, Tensor]:
        return self.tower.weights()

    def stagings(self) -> dict[str, Staging]:
        return {}

    def weight_bytes(self) -> dict[str, int]:
        return {name: view.nbytes for name, view in self.weights().items()}


@contextmanager
def open_checkpoint(arch: Model, path: Path) -> Iterator[Checkpoint]:
    """Open the checkpoint in the directory `path`; its files stay open while the block runs.

    Raises LoadError for every mismatch that the files' headers show, before memory is allocated.
    """
    with ExitStack() as opened:
        headers = []
        for place in checkpoint_files(path):
            file = opened.enter_context(open_file(place, LoadError))
            headers.append(_read_header(place, file))
        arch = with_stored_names(arch, {name for each in headers for name in each})
        found = StoredTensors(arch, opened)
        for header in headers:
            for name, stored in header.items():
                found.add(name, stored)
        arch = found.with_formats(path)
        yield Checkpoint(
            path, arch, found.check(arch, path), found.shared, found.verified, found.tied
        )


@contextmanager
def filling(
    decoder: Decoder | LoneTower, checkpoint: Checkpoint, shows: bool = True
) -> Iterator[None]:
    """Load the checkpoint's weights into the decoder while the block runs; at its end, wait.

    `shows`: whether to show the progress, as a bar on a terminal or in the log.

    Weights that are stored in another form than the decoder holds are loaded before the block, so
    that the memory for their stored form is free again. On a GPU the block may compute with the
    decoder. The results are meaningless but finite, because weights not yet read are zero. Raises
    LoadError for a file that cannot be read or is truncated, a stored output projection that
    differs from the tied embedding, or a tensor in `checkpoint.verified` with wrong numbers.
    """
    weights = decoder.weights()
    if decoder.device.type == "cuda":
        for weight in weights.values():
            weight.zero_()
    _verify(decoder, checkpoint)
    sources = _sources(checkpoint)
    for views in _staging(decoder):
        with reading(_aim(decoder, sources, views), decoder.device, shows):
            pass
    targets = _aim(decoder, sources, weights)
    tied_copy = None
    if checkpoint.tied is not None and EMBEDDING in weights:
        # On the host, so that it takes no device memory.
        tied_copy = torch.empty_like(weights[EMBEDDING], device="cpu")
        tied = sources[EMBEDDING]._replace(tensor=checkpoint.tensors[checkpoint.tied])
        targets += _share(decoder, tied, tied_copy)
    with reading(targets, decoder.device, shows):
        yield
    if tied_copy is not None and not torch.equal(tied_copy, weights[EMBEDDING].cpu()):
        file = checkpoint.tensors[str(checkpoint.tied)].path
        raise LoadError(
            f"{file}: tensor {checkpoint.tied} differs from the embedding, but the config says "
            "tie_word_embeddings=true"
        )


def _verify(decoder: Decoder | LoneTower, checkpoint: Checkpoint) -> None:
    """Check the tensors of this rank's weights that must have certain numbers."""
    held = decoder.weight_bytes()
    waiting = deque(
        (name, verified)
        for name, verified in checkpoint.verified.items()
        if verified.weight in held
    )
    while waiting:
        found = []
        num_bytes = 0
        while waiting and num_bytes < _STAGED_BYTES:
            name, verified = waiting.popleft()
            numbers = torch.empty(verified.expected.shape, dtype=verified.tensor.dtype)
            num_bytes += numbers.nbytes
            found.append((name, verified, numbers))
        targets = [(verified.tensor, numbers.view(1, -1, 1)) for _, verified, numbers in found]
        with reading(targets, decoder.device, shows=False):
            pass
        for name, verified, numbers in found:
            if not verified.expected.is_right(numbers):
                raise LoadError(
                    f"{verified.tensor.path}: tensor {name} has {verified.expected.otherwise}"
                )


def fill_randomly(decoder: Decoder | LoneTower) -> None:
    """Fill the decoder with random weights, always the same ones for the same decoder.

    The weights are as large as a trained model's, so that activations stay in range. They are not
    constant, because kernels run faster on zeros.
    """
    generator = torch.Generator(decoder.device).manual_seed(0)
    integers = decoder.arch.integers_by_scales()
    for views in chain(_staging(decoder), [decoder.weights()]):
        for name, view in views.items():
            _randomize(name, view, generator, integers.get(format_name(name)))


def _randomize(name: str, view: Tensor, generator: torch.Generator, kind: Integers | None) -> None:
    """`kind`: of the whole numbers of which the view has scales; None: it has none."""
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        view.uniform_(0.5, 1.5, generator=generator)
    elif name.endswith("_scales"):  # of MXFP4, as exponents
        view.random_(118, 122, generator=generator)
    elif name.endswith("g_idx"):
        view.zero_()
    elif name.endswith(("qzeros", "_zero_point")):  # as if numbers were symmetric
        view.fill_(0x77777777)
    elif view.dtype in (torch.uint8, torch.int8, torch.int32):  # any numbers, packed or not
        limits = torch.iinfo(view.dtype)
        view.random_(limits.min, limits.max, generator=generator)
    elif kind or "weight_scale" in name:
        largest = 0.128 / 2**kind.bits if kind else 3e-4
        view.uniform_(largest / 3, largest, generator=generator)
    elif view.dtype == torch.float8_e4m3fn:
        numbers = torch.empty(view.shape, device=view.device)
        view.copy_(numbers.normal_(0, 100, generator=generator).clamp_(-448, 448))
    else:
        view.normal_(0, 0.02, generator=generator)


def _staging(decoder: Decoder | LoneTower) -> Iterator[dict[str, Tensor]]:
    """Views, as of Decoder.weights, of weights that are stored in another form than is held.

    The views of some weights at a time; they are converted when the next ones are asked for.
    """
    waiting = deque(decoder.stagings().items())
    while waiting:
        views: dict[str, Tensor] = {}
        conversions = []
        num_bytes = 0
        while waiting and num_bytes < _STAGED_BYTES:
            name, staging = waiting.popleft()
            staged = staging.make(name)
            views |= staged.views
            num_bytes += sum(view.nbytes for view in staged.views.values())
            conversions.append(staged.convert)
        yield views
        for convert in conversions:
            convert()
    if decoder.device.type == "cuda":
        torch.cuda.empty_cache()  # so that the memory counts as free


class _Source(NamedTuple):
    """Where the checkpoint has a weight, and the weight's shape."""

    tensor: TensorSlice
    place: Place
    shape: tuple[int, ...]


def _sources(checkpoint: Checkpoint) -> dict[str, _Source]:
    """Canonical name -> source of each tensor that the weights are stored as."""
    shapes = checkpoint.arch.weights()
    places = checkpoint_places(checkpoint.arch)
    sources = {}
    for name, parts in checkpoint_tensors(checkpoint.arch).items():
        for part in parts:
            place = places[part]
            if name in checkpoint.shared:
                number = place.offset + place.first
                place = Place(number // checkpoint.shared[name], 1)
            sources[part] = _Source(checkpoint.tensors[name], place, shapes[part])
    return sources


def _aim(
    decoder: Decoder | LoneTower, sources: dict[str, _Source], views: dict[str, Tensor]
) -> list[tuple[TensorSlice, Tensor]]:
    """(source, target) for this rank's reads into `views`, as of Decoder.weights."""
    return [
        target
        for name, source in sources.items()
        if name in views
        for target in _share(decoder, source, views[name])
    ]


def _share(
    decoder: Decoder | LoneTower, source: _Source, into: Tensor
) -> list[tuple[TensorSlice, Tensor]]:
    """The slices and the target views of this rank's shard of a weight.

    `into`: has the shard's shape, which is smaller in at most one dimension. It may have one more
    leading dimension, for copies of the shard.
    """
    tensor, place, shape = source
    shard = into.shape[-len(shape) :]
    rows = shard[0] // place.rows
    columns = prod(shard[1:]) * place.rows
    row = decoder.shard.start(shape[0], shard[0]) // place.rows
    column = decoder.shard.start(prod(shape[1:]), prod(shard[1:])) * place.rows
    into = into.view(-1, rows, columns)
    if place.transposed:
        whole = replace(tensor, offset=_offset(tensor, place, column))
        return [
            (
                replace(
                    whole, width=place.width, first=first, count=some.shape[1], step=place.step
                ),
                some.mT,
            )
            for first, some in _runs(place, shape[0], row, into)
        ]
    offset = _offset(tensor, place, row)
    if columns == place.width and into.is_contiguous():  # no row is divided
        return [(replace(tensor, offset=offset), into.view(len(into), -1, 1))]
    first = place.first + column * place.step
    part = replace(
        tensor, offset=offset, width=place.width, first=first, count=columns, step=place.step
    )
    return [(part, into)]


def _offset(tensor: TensorSlice, place: Place, row: int) -> int:
    """The offset in the file of a row of the matrix at `place`."""
    return tensor.offset + (place.offset + row * place.width) * tensor.dtype.itemsize


def _runs(place: Place, whole: int, row: int, into: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first column of the matrix at `place`, rows of `into`) of each block of a transposed weight.

    `into`: [copies, rows, columns], from `row` on of the weight's `whole` rows.
    """
    size = whole // place.blocks
    count = into.shape[1]
    run = min(size, count)
    for at in range(0, count, run):
        block, within = divmod(row + at, size)
        first = place.first + block * (place.width // place.blocks) + within * place.step
        yield first, into[:, at : at + run]


def _read_header(file: Path, opened: BinaryIO) -> dict[str, StoredTensor]:
    """The header's tensor entries by name."""
    header, data_start = read_header(file, opened)
    size = os.fstat(opened.fileno()).st_size
    descriptor = opened.fileno()
    tensors = {
        name: _stored(file, descriptor, data_start, name, about) for name, about in header.items()
    }
    end = data_start
    for name, stored in sorted(
        tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if stored.offset != end or stored.num_bytes < 0:
            raise incomplete(file, f"tensor {shown(name)} does not begin where another ends")
        end += stored.num_bytes
    if end != size:
        raise incomplete(file, f"it has {size} bytes, its tensors end at byte {end}")
    return tensors


def _stored(file: Path, descriptor: int, data_start: int, name: str, about: Any) -> StoredTensor:
    match about:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
        } if all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            at = data_start + begin
            return StoredTensor(file, descriptor, at, end - begin, dtype, shape)
    raise incomplete(file, f"tensor {shown(name)} is described as {shown(repr(about))}")
