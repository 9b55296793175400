"""From files to tensors: threads that read pieces, each by way of one buffer of its own.

The buffer is pinned where the tensors are on a GPU, so that the copy to it needs no further one on
the host. Memory: at most _NUM_READERS * _PIECE_BYTES, whatever the files hold. Knows no models and
no file format.
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

# Copying out of the page cache takes one core about 2 ms a piece; on a disk, so many are asked for
# at a time.
_NUM_READERS = 16
_PIECE_BYTES = 16 << 20

_log = logging.getLogger(__name__)


class LoadError(ValueError):
    """The checkpoint does not fit its config; the message names the file and the tensor."""


@dataclass(frozen=True)
class TensorSlice:
    """Rows of numbers in a file that stays open; `offset` of the first row's first, in bytes.

    Of each row of `width` numbers those from `first` on are wanted, `count` of them.
    """

    path: Path
    descriptor: int
    offset: int
    dtype: torch.dtype
    width: int = 1
    first: int = 0
    count: int = 1


# As many numbers of a file as fit a buffer, and [copies, n] to fill with them, every row the same.
_Piece = tuple[TensorSlice, Tensor]


@contextmanager
def reading(targets: list[tuple[TensorSlice, Tensor]], device: torch.device) -> Iterator[None]:
    """Fill each tensor, [copies, n], with n numbers of its source, row by row the same.

    Tensors are on `device`, or on the host. Reads while the block runs and has read everything when
    it ends; a block that raises ends the reading. Raises LoadError for a file that cannot be read
    or ends too soon.
    """
    pieces = deque(piece for source, into in targets for piece in _cut(source, into))
    num_bytes = sum(_num_bytes(piece) for piece in pieces)
    stream = None
    if device.type == "cuda":
        # The memory to be filled may have been another tensor's, whose work is still under way.
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
    num_rows = into.shape[1] // source.count
    for row in range(0, num_rows, rows):
        piece = replace(source, offset=source.offset + row * row_bytes)
        yield piece, into[:, row * source.count : (row + rows) * source.count]


def _num_bytes(piece: _Piece) -> int:
    """Of the rows as they are in the file."""
    source, into = piece
    return into.shape[1] // source.count * source.width * source.dtype.itemsize


@torch.inference_mode()
def _read(pieces: deque[_Piece], stream: torch.cuda.Stream | None) -> float:
    """Take and move pieces until there are none; when that was. An error ends all readers.

    `stream`: of a GPU, to copy on.
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
                if stream is not None:  # wait until the buffer is free; others need the core
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
    if numbers.dtype != into.dtype or source.count < source.width:
        numbers = numbers.to(into.device, non_blocking=True)  # a GPU does the rest in no time
    wanted = numbers[:, source.first : source.first + source.count]
    into.unflatten(1, (-1, source.count)).copy_(wanted, non_blocking=True)


def _fill(memory: memoryview, source: TensorSlice) -> None:
    """Read as many bytes as `memory` has."""
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
