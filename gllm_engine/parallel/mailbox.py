"""Transfers between two GPUs of one node that leave all multiprocessors to the layers.

NCCL moves data by kernels. A kernel that waits for its peer keeps multiprocessors busy all the
time, and the products of the layers, whose blocks fill the GPU exactly, then take longer. A Mailbox
copies by the copy engines, and its streams wait by memory operations of the driver.

A mailbox carries tensors in one direction, in order. The receiver's memory has a ring of places. A
tensor larger than a place goes in several pieces. Piece n, counted from 1, uses place p, which is
n % PLACES:

    sender                                        receiver
    wait until free[p] is n - PLACES
    copy the piece to ring[p]       ------------>
    copy n to ready[p]              ------------> wait until ready[p] is n
                                                  copy ring[p] to the result
                                    <------------ copy n to free[p]

A rank waits only for flags in its own memory: `ready` is the receiver's, `free` the sender's.
Numbers are counted modulo NUMBERS. A place holds one piece at a time, so the flag of a place is
either the awaited number or the one before it, and a comparison for equality is enough.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

PLACES = 4
NUMBERS = 1 << 16
_ALIGNMENT = 256  # bytes between the ring and the flags
_WAIT_EQUAL = 1  # the driver's CU_STREAM_WAIT_VALUE_EQ


@dataclass(frozen=True)
class Memory:
    """The memory of one end of a mailbox, as one of the two ranks addresses it."""

    ring: Tensor  # [PLACES, bytes of a place] uint8
    ready: Tensor  # [PLACES] int32, zero at first
    free: Tensor  # [PLACES] int32, zero at first


class Streams(Protocol):
    """How a mailbox orders its copies with other work."""

    def aside(self, x: Tensor) -> AbstractContextManager[None]:
        """Run the block's work after all work so far, without delaying later work. `x`, which the
        block reads, is kept until then.
        """

    def wait(self, flag: Tensor, number: int) -> None:
        """Delay all later work until `flag` [1] is `number`."""


class Mailbox:
    """One end of a transfer; the sender calls only send(), the receiver only receive()."""

    def __init__(self, mine: Memory, theirs: Memory, numbers: Tensor, streams: Streams) -> None:
        """`numbers`: [NUMBERS] int32, 0, 1, 2, ..., in this rank's memory."""
        self._mine = mine
        self._theirs = theirs
        self._numbers = numbers
        self._streams = streams
        self._count = 0  # pieces so far

    def send(self, x: Tensor) -> None:
        """Send x. The caller must not write to it afterwards."""
        x = x.contiguous()
        with self._streams.aside(x):
            for piece in self._pieces(x):
                place, number = self._next()
                if self._count > PLACES:
                    self._streams.wait(self._mine.free[place], (number - PLACES) % NUMBERS)
                self._theirs.ring[place.start, : len(piece)].copy_(piece)
                self._theirs.ready[place].copy_(self._numbers[number : number + 1])

    def receive(self, x: Tensor) -> Arrival:
        """Begin to receive the next tensor into x, contiguous and of the sent tensor's shape."""
        return Arrival(self, x)

    def take(self, x: Tensor) -> None:
        """Fill x with the next tensor. Later work of this stream waits for it."""
        for piece in self._pieces(x):
            place, number = self._next()
            self._streams.wait(self._mine.ready[place], number)
            piece.copy_(self._mine.ring[place.start, : len(piece)])
            self._theirs.free[place].copy_(self._numbers[number : number + 1])

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """x as pieces of bytes."""
        pieces: tuple[Tensor, ...] = x.view(-1).view(torch.uint8).split(self._mine.ring.shape[1])
        return pieces

    def _next(self) -> tuple[slice, int]:
        """The place and the number of the next piece."""
        self._count += 1
        place = self._count % PLACES
        return slice(place, place + 1), self._count % NUMBERS


@dataclass(frozen=True)
class Arrival:
    """A tensor on its way. Arrivals must be waited for in the order of the receives."""

    mailbox: Mailbox
    x: Tensor

    def wait(self) -> None:
        """Later work of this stream waits for the tensor."""
        self.mailbox.take(self.x)


class GpuStreams:
    """See Streams: work is that of the current CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._aside = torch.cuda.Stream(device)

    @contextmanager
    def aside(self, x: Tensor) -> Iterator[None]:
        self._aside.wait_stream(torch.cuda.current_stream())
        x.record_stream(self._aside)
        with torch.cuda.stream(self._aside):
            yield

    def wait(self, flag: Tensor, number: int) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        address = ctypes.c_uint64(flag.data_ptr())
        error = _driver().cuStreamWaitValue32_v2(stream, address, number, _WAIT_EQUAL)
        if error:
            raise RuntimeError(f"cuStreamWaitValue32 failed with error {error} of the CUDA driver")


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def can_reach(device: torch.device) -> bool:
    """Whether `device` can write to the memory of every other GPU that this process sees."""
    return all(
        torch.cuda.can_device_access_peer(device, other)
        for other in range(torch.cuda.device_count())
        if other != device.index
    )


def open_mailbox(group: dist.ProcessGroup, place_bytes: int, device: torch.device) -> Mailbox:
    """This rank's end of a mailbox between the two ranks of `group`, which both call this.

    `place_bytes`: a multiple of _ALIGNMENT. Both ends have a ring, because symmetric memory is
    equally large on all ranks.
    """
    from torch.distributed import _symmetric_memory as symmetric

    ring_bytes = PLACES * place_bytes
    memory = symmetric.empty(ring_bytes + 2 * _ALIGNMENT, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)  # the flags are zero before the peer gets their address
    handle = symmetric.rendezvous(memory, group.group_name)
    peer = 1 - dist.get_rank(group)

    def divide(whole: Tensor) -> Memory:
        ready, free = whole[ring_bytes:].view(torch.int32).view(2, -1)[:, :PLACES]
        return Memory(whole[:ring_bytes].view(PLACES, place_bytes), ready, free)

    theirs = handle.get_buffer(peer, (len(memory),), torch.uint8)
    numbers = torch.arange(NUMBERS, dtype=torch.int32, device=device)
    dist.barrier(group)  # both ends are ready
    return Mailbox(divide(memory), divide(theirs), numbers, GpuStreams(device))
