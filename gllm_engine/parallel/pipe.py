"""The way of a step through the stages: activations to the next one, sampled tokens to the first.

Sends and receives are asynchronous and in the order of the steps. On GPUs they run on NCCL's own
streams: what computes on a received tensor waits for it there, never the host. Owns the lifetime of
tensors under way. Knows tensors and nothing of what they mean.
"""

from __future__ import annotations

from collections import deque

import torch.distributed as dist
from torch import Tensor

Peer = tuple[int, dist.ProcessGroup | None]  # a rank, and the group shared with it

# More steps than this are never under way; config.py sees to it.
_MOST_SENDING = 64


class Pipe:
    """This rank's neighbours. A pipe of one stage sends nothing."""

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
        # A tensor under way must not be freed, nor written to: it is kept until it has been sent.
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def receive(self, x: Tensor) -> Tensor:
        """Fill x with what the stage before sent next. Whatever computes on x afterwards waits."""
        assert self._before is not None
        self._irecv(x, self._before).wait()
        return x

    def send(self, x: Tensor) -> None:
        """Hand x to the stage after; it must not be written to any more."""
        assert self._after is not None
        self._isend(x, self._after)

    def return_tokens(self, tokens: Tensor) -> None:
        """On the last stage: send sampled tokens to the first."""
        self._isend(tokens, self._first)

    def await_tokens(self, tokens: Tensor) -> dist.Work:
        """On the first stage: fill `tokens` with what the last stage returns next, at some time;
        after its wait() they may be read.
        """
        return self._irecv(tokens, self._last)

    def _isend(self, x: Tensor, peer: Peer) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        while len(self._sending) > _MOST_SENDING:  # gloo's are not completed until waited for
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
