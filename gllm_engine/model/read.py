"""Reads files into tensors, with threads that each read pieces through a buffer of their own.

For tensors on a GPU the buffers are pinned, so that the copy to the GPU needs no other copy on the
host. The buffers take at most _NUM_READERS * _PIECE_BYTES of memory, whatever the files' size. This
module knows no models and no file format.

Ranks of one node read a file together: every rank reads the pieces that it needs in the order of
the file. A piece that several ranks need comes from the disk once, because the first read leaves it
in the page cache and the other ranks read it soon afterwards.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gllm_engine.arch import LoadError

# To copy a piece out of the page cache takes one core about 2 ms. The number of readers is the
# queue depth of reads from a disk.
_NUM_READERS = 16
_PIECE_BYTES = 16 << 20
# Seconds between two log lines about the progress.
_TELL_S = 5.0

_log = logging.getLogger(__name__)


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


class _Progress:
    """Shows how many of `num_bytes` have been read: a bar on a terminal, else log lines.

    Readers on several threads may add to it.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._done = 0
        self._start = time.perf_counter()
        self._told = self._start
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=num_bytes, desc="weights", unit="B", unit_scale=True, leave=False, disable=None
        )

    def add(self, num_bytes: int) -> None:
        """Count bytes that have been read."""
        with self._lock:
            self._done += num_bytes
            self._bar.update(num_bytes)
            now = time.perf_counter()
            if self._bar.disable and now - self._told >= _TELL_S and self._done < self._num_bytes:
                self._told = now
                self._tell(self._done / max(now - self._start, 1e-9))

    def _tell(self, speed: float) -> None:
        """`speed`: bytes per second."""
        _log.info(
            "%.0f%% of %.2f GB of weights read, %.1f GB/s, about %.0f s left",
            100 * self._done / self._num_bytes,
            self._num_bytes / 1e9,
            speed / 1e9,
            (self._num_bytes - self._done) / speed,
        )

    def close(self) -> None:
        self._bar.close()


@contextmanager
def reading(
    targets: list[tuple[TensorSlice, Tensor]], device: torch.device, shows: bool = True
) -> Iterator[None]:
    """Fill each target, [copies, rows, count], with the numbers of its source slice; all copies get
    the same.

    Targets are on `device` or on the host. Reading runs during the block, and is complete when the
    context ends; an exception in the block stops it. `shows`: whether to show the progress. Raises
    LoadError for a file that cannot be read or is truncated.
    """
    in_order = sorted(targets, key=_place)
    pieces = deque(piece for source, into in in_order for piece in _cut(source, into))
    num_bytes = sum(_num_bytes(piece) for piece in pieces)
    progress = _Progress(num_bytes) if shows else None
    stream = None
    if device.type == "cuda":
        # Kernels in flight may still use the targets' memory for a tensor that was freed.
        torch.cuda.current_stream(device).synchronize()
        stream = torch.cuda.Stream(device)
    start = time.perf_counter()
    with ThreadPoolExecutor(_NUM_READERS, "weights") as pool:
        num_readers = min(_NUM_READERS, len(pieces))
        readers = [pool.submit(_read, pieces, stream, progress) for _ in range(num_readers)]
        try:
            yield
            ends = [reader.result() for reader in readers]
        finally:
            pieces.clear()
            if progress is not None:
                progress.close()
    seconds = max(ends, default=start) - start
    speed = num_bytes / 1e9 / max(seconds, 1e-9)
    _log.info("read %.2f GB of weights in %.1f s, %.1f GB/s", num_bytes / 1e9, seconds, speed)


def _place(target: tuple[TensorSlice, Tensor]) -> tuple[str, int]:
    """The position in the checkpoint, in the order of reading."""
    source, _ = target
    return str(source.path), source.offset


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
def _read(
    pieces: deque[_Piece], stream: torch.cuda.Stream | None, progress: _Progress | None
) -> float:
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
                if progress is not None:
                    progress.add(_num_bytes(piece))
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
