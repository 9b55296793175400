"""Transfers between pipeline stages: activations to the next stage, sampled tokens to the first.

Sends and receives are asynchronous and in the order of the steps. On GPUs they run on NCCL's own
streams: kernels that use a received tensor wait for the transfer, the host does not. This module
owns the lifetime of tensors being sent. It does not interpret tensors.
"""

from __future__ import annotations

from collections import deque

import torch.distributed as dist
from torch import Tensor

Peer = tuple[int, dist.ProcessGroup | None]  # a rank, and the group shared with it

# At least the number of steps that can be in flight, which config.py limits.
_MOST_SENDING = 64


class Pipe:
    """This rank's connections to other stages. A pipe of one stage sends nothing."""

    def __init__(
        self,
        stage: int = 0,
        stages: int = 1,
        before: Peer | None = None,
        after: Peer | None = None,
        first: Peer = (0, None),
        last: Peer = (0, None),
    ) -> None:
        self.is_first = stage == 0
        self.is_last = stage == stages - 1
        self._before = before
        self._after = after
        self._first = first
        self._last = last
        # A tensor must not be freed before it has been sent, so it is kept here until then.
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def receive(self, x: Tensor) -> Tensor:
        """Fill x with the previous stage's next tensor. Later kernels wait for the transfer."""
        assert self._before is not None
        self._irecv(x, self._before).wait()
        return x

    def send(self, x: Tensor) -> None:
        """Send x to the next stage. The caller must not write to x afterwards."""
        assert self._after is not None
        self._isend(x, self._after)

    def return_tokens(self, tokens: Tensor) -> None:
        """On the last stage: send sampled tokens to the first stage."""
        self._isend(tokens, self._first)

    def await_tokens(self, tokens: Tensor) -> dist.Work:
        """On the first stage: start to receive the last stage's next tokens into `tokens`.

        `tokens` may be read after wait() on the returned work.
        """
        return self._irecv(tokens, self._last)

    def _isend(self, x: Tensor, peer: Peer) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        while len(self._sending) > _MOST_SENDING:  # gloo completes only in wait()
            self._sending.popleft()[0].wait()
        rank, group = peer
        x = x.contiguous()
        self._sending.append((_under_way(dist.isend(x, rank, group)), x))

    def _irecv(self, x: Tensor, peer: Peer) -> dist.Work:
        rank, group = peer
        return _under_way(dist.irecv(x, rank, group))


def _under_way(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not a rank of the group"
    return work
