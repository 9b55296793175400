"""Mailboxes on a CPU: threads are the ranks, and a wait is a loop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import WAIT_S
from torch import Tensor

from gllm_engine.parallel.mailbox import NUMBERS, PLACES, Mailbox, Memory

PLACE_BYTES = 64
_NUMBERS = torch.arange(NUMBERS, dtype=torch.int32)


class HostStreams:
    """All work runs at once. `waits`: how often a flag had not its number yet."""

    def __init__(self) -> None:
        self.waits = 0
        self.ended = threading.Event()

    @contextlib.contextmanager
    def aside(self, x: Tensor) -> Iterator[None]:
        yield

    def wait(self, flag: Tensor, number: int) -> None:
        self.waits += int(flag) != number
        limit = time.monotonic() + WAIT_S
        while int(flag) != number:
            if self.ended.is_set() or time.monotonic() > limit:
                raise TimeoutError
            time.sleep(0)


def ends() -> tuple[Mailbox, Mailbox]:
    """A sender's and a receiver's end."""
    memories = [
        Memory(
            torch.zeros(PLACES, PLACE_BYTES, dtype=torch.uint8),
            torch.zeros(PLACES, dtype=torch.int32),
            torch.zeros(PLACES, dtype=torch.int32),
        )
        for _ in range(2)
    ]
    sender = Mailbox(memories[0], memories[1], _NUMBERS, HostStreams())
    return sender, Mailbox(memories[1], memories[0], _NUMBERS, HostStreams())


def carry(sender: Mailbox, receiver: Mailbox, tensors: list[Tensor]) -> list[Tensor]:
    def send() -> None:
        for x in tensors:
            sender.send(x)

    thread = threading.Thread(target=send)
    thread.start()
    received = []
    for x in tensors:
        y = torch.empty_like(x)
        receiver.receive(y).wait()
        received.append(y)
    thread.join()
    return received


@given(
    sizes=st.lists(st.integers(0, 150), max_size=30),
    before=st.sampled_from([0, 1, NUMBERS - 3, 3 * NUMBERS - 1]),
)
@settings(max_examples=40, deadline=None)
def test_tensors_come_whole_and_in_order(sizes: list[int], before: int) -> None:
    """Up to ten pieces each, also where the numbers begin anew. `before`: pieces sent earlier."""
    sender, receiver = ends()
    for end in (sender, receiver):
        end._count = before
    if before:  # what earlier pieces have left in the flags
        for piece in range(before - PLACES + 1, before + 1):
            receiver._mine.ready[piece % PLACES] = piece % NUMBERS
            sender._mine.free[piece % PLACES] = piece % NUMBERS
    tensors = [torch.randint(0, 1 << 30, (size,), dtype=torch.int32) for size in sizes]
    for sent, received in zip(tensors, carry(sender, receiver, tensors), strict=True):
        assert torch.equal(sent, received)


def test_rows_that_are_not_contiguous_and_of_any_dtype() -> None:
    sender, receiver = ends()
    tensors = [torch.rand(8, 6)[:, ::2], torch.rand(5, 3, dtype=torch.float64), torch.arange(3)]
    for sent, received in zip(tensors, carry(sender, receiver, tensors), strict=True):
        assert torch.equal(sent, received)


def test_a_sender_waits_for_a_place() -> None:
    """Five pieces for four places: the fifth comes only after the first was taken."""
    sender, receiver = ends()
    pieces = [torch.full((PLACE_BYTES,), n, dtype=torch.uint8) for n in range(1, PLACES + 2)]
    for piece in pieces[:PLACES]:
        sender.send(piece)
    streams = sender._streams
    assert isinstance(streams, HostStreams) and streams.waits == 0
    thread = threading.Thread(target=sender.send, args=(pieces[PLACES],))
    thread.start()
    limit = time.monotonic() + WAIT_S
    while not streams.waits:
        assert time.monotonic() < limit
        time.sleep(0.001)
    assert receiver._mine.ring[(PLACES + 1) % PLACES].unique().tolist() == [1]
    for piece in pieces:
        received = torch.empty_like(piece)
        receiver.receive(received).wait()
        assert torch.equal(received, piece)
    thread.join()


def test_a_receiver_waits_for_its_tensor() -> None:
    sender, receiver = ends()
    streams = receiver._streams
    assert isinstance(streams, HostStreams)
    arrival = receiver.receive(torch.empty(3))
    streams.ended.set()
    with pytest.raises(TimeoutError):
        arrival.wait()
    del sender
