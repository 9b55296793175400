"""The protocol of the one-shot all-reduce, in Triton's interpreter: two ranks in one process.

A rank that waits polls a flag; what the other rank does meanwhile happens within that poll, so that
the order of events is the test's to choose. On two GPUs, workers/test_gpu_ranks.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

tl = pytest.importorskip("triton.language")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)
from triton.runtime.interpreter import interpreter_builder  # noqa: E402

from gllm_engine.ops.triton import one_shot_allreduce  # noqa: E402

ROWS, DIM = one_shot_allreduce.MAX_ROWS, 16
# The last epoch before a 32-bit number wraps around, and before it changes its sign.
LARGEST, MINUS_ONE = 2**31 - 1, -1

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


class Ranks:
    """Two ranks that have summed each row as often as `epoch` says, and did not lose a step."""

    def __init__(self, epoch: int) -> None:
        self.buffers = [torch.full((2, ROWS, DIM), torch.nan).half() for _ in range(2)]
        self.flags = [torch.full((2, ROWS), epoch, dtype=torch.int32) for _ in range(2)]
        self.epochs = [torch.full((ROWS,), epoch, dtype=torch.int32) for _ in range(2)]

    def sum(self, rank: int, part: Tensor) -> Tensor:
        """What `rank` gets for its part [rows, DIM]."""
        pointers = [torch.tensor([t.data_ptr() for t in x]) for x in (self.buffers, self.flags)]
        total = torch.zeros_like(part)
        one_shot_allreduce._join[(len(part),)](
            part, total, part, part, *pointers, self.epochs[rank], DIM, 0.0, rank,
            RANKS=2, ROWS=ROWS, KIND=tl.float16, BLOCK=DIM, NORM=False,
        )  # fmt: skip
        return total


def on_polls(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """act(n) before the n-th look at a flag, of all looks from now on."""
    real, polls = interpreter_builder.create_atomic_rmw, 0

    def rmw(operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        nonlocal polls
        if not value.data.any() and "ADD" in str(operation):
            polls += 1
            act(polls)
        return real(operation, pointer, value, *rest)

    monkeypatch.setattr(interpreter_builder, "create_atomic_rmw", rmw)


@pytest.mark.parametrize("epoch", [0, LARGEST - 1, LARGEST, LARGEST + 1 - 2**32, MINUS_ONE])
def test_a_rank_waits_for_one_that_is_behind(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(epoch)
    parts = torch.arange(2 * DIM).view(2, 1, DIM).half()
    others: list[Tensor] = []

    def act(poll: int) -> None:
        assert poll < 20, "the flag has come, and is not seen"
        if poll == 7 and not others:
            others.append(ranks.sum(1, parts[1]))

    on_polls(monkeypatch, act)
    assert torch.equal(ranks.sum(0, parts[0]), parts.sum(0))
    assert torch.equal(others[0], parts.sum(0))


@pytest.mark.parametrize("epoch", [0, LARGEST - 1, LARGEST, MINUS_ONE])
def test_a_rank_that_is_ahead_is_not_waited_for(
    epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it has written for its next sum is not read."""
    ranks = Ranks(epoch)
    parts = torch.arange(2 * DIM).view(2, 1, DIM).half()
    next_epoch = torch.tensor(epoch, dtype=torch.int32) + 1
    ranks.buffers[1][next_epoch & 1, 0] = parts[1]
    ranks.buffers[1][next_epoch + 1 & 1, 0] = torch.nan
    ranks.flags[0][1, 0] = next_epoch + 1

    def act(poll: int) -> None:
        assert poll <= 2, "one look at each rank's flag is enough"

    on_polls(monkeypatch, act)
    assert torch.equal(ranks.sum(0, parts[0]), parts.sum(0))


def test_sums_across_the_wrap_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the buffer's halves, and of which rank is the first to come."""
    ranks = Ranks(LARGEST - 3)
    for turn in range(8):
        first, second = turn % 2, 1 - turn % 2
        parts = torch.randint(-50, 50, (2, 1, DIM)).half()
        found: dict[int, Tensor] = {}

        def act(poll: int, second: int = second, parts: Tensor = parts, found=found) -> None:
            assert poll < 20, "the flag has come, and is not seen"
            if poll == 3:
                found[second] = ranks.sum(second, parts[second])

        with monkeypatch.context() as patched:
            on_polls(patched, act)
            found[first] = ranks.sum(first, parts[first])
        assert all(torch.equal(found[rank], parts.sum(0)) for rank in (0, 1)), turn
        written = ranks.buffers[0][:, 0].isfinite().all(1)
        assert written.all() if turn else written.sum() == 1
    assert ranks.epochs[0][0] == LARGEST - 3 + 8 - 2**32
