"""Reads files into tensors, with threads that each read pieces through a buffer of their own.

For tensors on a GPU the buffers are pinned, so that the copy to the GPU needs no other copy on the
host. The buffers take at most _NUM_READERS * _PIECE_BYTES of memory, whatever the files' size. This
module knows no models and no file format.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

# To copy a piece out of the page cache takes one core about 2 ms. The number of readers is the
# queue depth of reads from a disk.
_NUM_READERS = 16
_PIECE_BYTES = 16 << 20

_log = logging.getLogger(__name__)


class LoadError(ValueError):
    """A checkpoint that does not match its config; the message names the file and the tensor."""


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a matrix in an open file: `count` of its `width` columns, every `step`-th from
    `first` on.

    `offset`: byte offset of the first row in the file.
    """

    path: Path
    descriptor: int
    offset: int
    dtype: torch.dtype
    width: int = 1
    first: int = 0
    count: int = 1
    step: int = 1


# A source slice that fits a buffer, and its target, [copies, rows, count], whose copies all get the
# same data.
_Piece = tuple[TensorSlice, Tensor]


@contextmanager
def reading(targets: list[tuple[TensorSlice, Tensor]], device: torch.device) -> Iterator[None]:
    """Fill each target, [copies, rows, count], with the numbers of its source slice; all copies get
    the same.

    Targets are on `device` or on the host. Reading runs during the block, and is complete when the
    context ends; an exception in the block stops it. Raises LoadError for a file that cannot be
    read or is truncated.
    """
    pieces = deque(piece for source, into in targets for piece in _cut(source, into))
    num_bytes = sum(_num_bytes(piece) for piece in pieces)
    stream = None
    if device.type == "cuda":
        # Kernels in flight may still use the targets' memory for a tensor that was freed.
        torch.cuda.current_stream(device).synchronize()
        stream = torch.cuda.Stream(device)
    start = time.perf_counter()
    with ThreadPoolExecutor(_NUM_READERS, "weights") as pool:
        num_readers = min(_NUM_READERS, len(pieces))
        readers = [pool.submit(_read, pieces, stream) for _ in range(num_readers)]
        try:
            yield
            ends = [reader.result() for reader in readers]
        finally:
            pieces.clear()
    seconds = max(ends, default=start) - start
    speed = num_bytes / 1e9 / max(seconds, 1e-9)
    _log.info("read %.2f GB of weights in %.1f s, %.1f GB/s", num_bytes / 1e9, seconds, speed)


def _cut(source: TensorSlice, into: Tensor) -> Iterator[_Piece]:
    row_bytes = source.width * source.dtype.itemsize
    rows = max(1, _PIECE_BYTES // row_bytes)
    for row in range(0, into.shape[1], rows):
        piece = replace(source, offset=source.offset + row * row_bytes)
        yield piece, into[:, row : row + rows]


def _num_bytes(piece: _Piece) -> int:
    """Size in the file of the piece's whole rows."""
    source, into = piece
    return into.shape[1] * source.width * source.dtype.itemsize


@torch.inference_mode()
def _read(pieces: deque[_Piece], stream: torch.cuda.Stream | None) -> float:
    """Read pieces until none are left; returns the end time. An error stops all readers.

    `stream`: the CUDA stream for copies to a GPU.
    """
    try:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=stream is not None)
            while pieces:
                try:
                    piece = pieces.popleft()
                except IndexError:  # another reader took the last one
                    break
                _move(piece, buffer)
                if stream is not None:  # free the buffer; block without spinning
                    copied = torch.cuda.Event(blocking=True)
                    copied.record(stream)
                    copied.synchronize()
    except BaseException:
        pieces.clear()
        raise
    return time.perf_counter()


def _move(piece: _Piece, buffer: Tensor) -> None:
    source, into = piece
    num_bytes = _num_bytes(piece)
    raw = buffer[:num_bytes]
    _fill(raw.numpy().data, source)
    numbers = raw.view(source.dtype).view(-1, source.width)
    if numbers.dtype != into.dtype or source.count < source.width or not into.is_contiguous():
        numbers = numbers.to(into.device, non_blocking=True)  # convert and slice on the GPU
    end = source.first + source.count * source.step
    into.copy_(numbers[:, source.first : end : source.step], non_blocking=True)


def _fill(memory: memoryview, source: TensorSlice) -> None:
    """Fill `memory` from the source's offset on. Raises LoadError at the end of the file."""
    offset = source.offset
    try:
        while memory:
            count = os.preadv(source.descriptor, [memory], offset)
            if not count:
                raise LoadError(
                    f"{source.path}: not a complete safetensors file (it ends at byte {offset})"
                )
            memory = memory[count:]
            offset = offset + count
    except OSError as error:
        raise LoadError(f"{source.path}: cannot be read ({error.strerror})") from None
