"""Transfers between pipeline stages: activations to the next stage, sampled tokens to the first.

Sends and receives are asynchronous and in the order of the steps: kernels that use a received
tensor wait for the transfer, the host does not. A Link carries tensors from one rank to another:
a Mailbox between GPUs of one node, else a GroupLink. This module does not interpret tensors.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

# At least the number of steps that can be in flight, which config.py limits.
_MOST_SENDING = 64


class Awaited(Protocol):
    """A tensor that is being received. It may be read after wait()."""

    def wait(self) -> object: ...


class Link(Protocol):
    """Carries tensors between two ranks, in one direction."""

    def send(self, x: Tensor) -> None:
        """Send x. The caller must not write to it afterwards."""

    def receive(self, x: Tensor) -> Awaited:
        """Begin to receive the next tensor into x, which is contiguous."""


class GroupLink:
    """A link through torch.distributed. Owns the lifetime of tensors being sent."""

    def __init__(self, peer: int, group: dist.ProcessGroup | None) -> None:
        """`peer`: the other rank; `group`: shared with it."""
        self._peer = peer
        self._group = group
        # A tensor must not be freed before it has been sent, so it is kept here until then.
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, x: Tensor) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        while len(self._sending) > _MOST_SENDING:  # gloo completes only in wait()
            self._sending.popleft()[0].wait()
        x = x.contiguous()
        self._sending.append((_under_way(dist.isend(x, self._peer, self._group)), x))

    def receive(self, x: Tensor) -> Awaited:
        return _under_way(dist.irecv(x, self._peer, self._group))


def _under_way(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not a rank of the group"
    return work


class Pipe:
    """This rank's connections to other stages. A pipe of one stage sends nothing."""

    def __init__(
        self,
        stage: int = 0,
        stages: int = 1,
        before: Link | None = None,
        after: Link | None = None,
        back: Link | None = None,
    ) -> None:
        """`before`, `after`: from the previous and to the next stage. `back`: on the last and the
        first stage, for tokens from the last to the first.
        """
        self.is_first = stage == 0
        self.is_last = stage == stages - 1
        self._before = before
        self._after = after
        self._back = back

    def receive(self, x: Tensor) -> Tensor:
        """Fill x with the previous stage's next tensor. Later kernels wait for the transfer."""
        assert self._before is not None
        self._before.receive(x).wait()
        return x

    def send(self, x: Tensor) -> None:
        """Send x to the next stage. The caller must not write to x afterwards."""
        assert self._after is not None
        self._after.send(x)

    def return_tokens(self, tokens: Tensor) -> None:
        """On the last stage: send sampled tokens to the first stage."""
        assert self._back is not None
        self._back.send(tokens)

    def await_tokens(self, tokens: Tensor) -> Awaited:
        """On the first stage: start to receive the last stage's next tokens into `tokens`.

        `tokens` may be read after wait() on the result; results are waited for in order.
        """
        assert self._back is not None
        return self._back.receive(tokens)
