"""Kernels of two tensor-parallel ranks that share one GPU: each rank is a stream or a thread.

With NCCL and symmetric memory, on two GPUs: workers/test_gpu_ranks.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import triton.language as tl
from torch import Tensor

from gllm_engine.ops import PlainSampling, triton
from gllm_engine.ops.triton import one_shot_allreduce

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DIM = 5120
# The last epoch before a 32-bit number wraps around.
LARGEST = 2**31 - 1
REPLAYS = 300
GROUP = 2048


class OneShotRanks:
    """Two ranks that have summed each row as often as `epoch` says."""

    def __init__(self, epoch: int) -> None:
        rows = one_shot_allreduce.MAX_ROWS
        self.buffers = [torch.full((2, rows, DIM), torch.nan).half().to(CUDA) for _ in range(2)]
        self.flags = [torch.full((2, rows), epoch, dtype=torch.int32).to(CUDA) for _ in range(2)]
        self.epochs = [torch.full((rows,), epoch, dtype=torch.int32).to(CUDA) for _ in range(2)]
        self._pointers = [
            torch.tensor([t.data_ptr() for t in x]).to(CUDA) for x in (self.buffers, self.flags)
        ]

    def sum(self, rank: int, part: Tensor, total: Tensor) -> None:
        one_shot_allreduce._join[(len(part),)](
            part, total, part, part, *self._pointers, self.epochs[rank], DIM, 0.0, rank,
            RANKS=2, ROWS=one_shot_allreduce.MAX_ROWS, KIND=tl.float16, BLOCK=8192, NORM=False,
            num_warps=16,
        )  # fmt: skip

    @staticmethod
    def compile() -> None:
        """While a rank waits in its kernel, the GPU may refuse to load another one."""
        for rank in range(2):
            ahead = OneShotRanks(0)
            ahead.flags[rank].fill_(1)  # so that neither rank waits
            part = torch.zeros(1, DIM, device=CUDA).half()
            ahead.sum(rank, part, part.clone())
            torch.cuda.synchronize()


class CountingRank:
    """A graph of one sum. The parts differ from replay to replay, and `errors` counts bad sums."""

    def __init__(self, ranks: OneShotRanks, rank: int, rows: int) -> None:
        self.stream = torch.cuda.Stream()
        self.errors = torch.zeros((), device=CUDA, dtype=torch.int64)
        self._count = torch.zeros(rows, 1, device=CUDA, dtype=torch.int64)
        # All tensors that the graph reads live as long as the graph.
        self._part = torch.zeros(rows, DIM, device=CUDA).half()
        self._total = torch.zeros(rows, DIM, device=CUDA).half()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self.stream):
            self._count.add_(1)
            values = [self._count % 101, self._count * 2 % 101]
            self._part.copy_(values[rank].expand_as(self._part))
            self._total.zero_()
            ranks.sum(rank, self._part, self._total)
            self.errors.add_((self._total != values[0] + values[1]).sum())

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self._graph.replay()


@pytest.mark.parametrize("rows", [1, one_shot_allreduce.MAX_ROWS])
@pytest.mark.parametrize("epoch", [0, LARGEST - REPLAYS // 2])
def test_no_sum_is_read_too_early_or_too_late(epoch: int, rows: int) -> None:
    OneShotRanks.compile()
    ranks = OneShotRanks(epoch)
    sides = [CountingRank(ranks, rank, rows) for rank in range(2)]
    torch.cuda.synchronize()
    for _ in range(REPLAYS):
        for side in sides:
            side.replay()
    torch.cuda.synchronize()
    assert [side.errors.item() for side in sides] == [0, 0]
    after = (epoch + REPLAYS + 2**31) % 2**32 - 2**31
    assert ranks.epochs[0][0].item() == ranks.epochs[1][0].item() == after


class ThreadGroup:
    """A TensorGroup whose ranks are two threads of one process."""

    size = 2
    group = None
    same_node = True

    def __init__(self, rank: int, barrier: Barrier, board: list[Tensor | None]) -> None:
        self.rank = rank
        self._barrier = barrier
        self._board = board

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._board[self.rank] = x.clone()
        self._barrier.wait(60)
        found = [part for part in self._board if part is not None]
        self._barrier.wait(60)
        return found

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), 1)

    def max(self, x: Tensor) -> Tensor:
        return x.copy_(torch.maximum(*self._exchange(x)))

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x)).sum(0))

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchange(x)[0])


def sampling_state(slots: Tensor, seed: int) -> PlainSampling:
    """Every third row is greedy."""
    rows = len(slots)
    temperature = torch.ones(rows, device=CUDA).double()
    temperature[slots[::3]] = 0
    seeds = torch.arange(rows, device=CUDA) + seed
    zeros = torch.zeros(rows, device=CUDA).long()
    return PlainSampling(temperature, seeds, zeros, zeros + 5, zeros.clone())


def sample_by_two(
    scores: Tensor, slots: Tensor, states: list[PlainSampling], vocab: int | None = None
) -> list[Tensor]:
    barrier = Barrier(2)
    board: list[Tensor | None] = [None, None]

    def as_rank(rank: int) -> Tensor:
        group = ThreadGroup(rank, barrier, board)
        shard = scores.chunk(2, 1)[rank].contiguous()
        return triton.sample_plain(shard, slots, states[rank], ranks=group, vocab=vocab)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(as_rank, range(2)))


@pytest.mark.parametrize("missing", [0, 5, GROUP + 1])
@pytest.mark.parametrize("rows", [1, 300])
def test_two_ranks_sample_what_one_would(rows: int, missing: int) -> None:
    """`missing`: tokens that the last rank has fewer than the first one."""
    vocab = 32 * GROUP - missing
    whole = 3 * torch.randn(rows, 32 * GROUP, device=CUDA)
    whole[:, vocab:] = 1e4  # would be chosen if it were read
    slots = torch.randperm(rows, device=CUDA)
    states = [sampling_state(slots, 7) for _ in range(3)]
    # Of rows as long as those of both ranks: the order of a float32 sum depends on their alignment,
    # and of some thousand tokens one lies so close to the next that the last bit decides.
    expected = triton.sample_plain(whole, slots, states[2], vocab=vocab)
    for tokens in sample_by_two(whole, slots, states[:2], vocab):
        assert torch.equal(tokens, expected)
    for state in states:
        assert torch.equal(state.last_tokens[slots], expected)


def test_ranks_that_would_choose_otherwise_agree() -> None:
    scores = 3 * torch.randn(300, 32 * GROUP, device=CUDA)
    slots = torch.randperm(300, device=CUDA)
    states = [sampling_state(slots, seed) for seed in (7, 1007)]
    choices = [triton.sample_plain(scores, slots, state) for state in states]
    assert not torch.equal(*choices)
    first, second = sample_by_two(scores, slots, states)
    assert torch.equal(first, second)
    choices.append(scores.argmax(1))  # of a row that neither rank has marked
    assert torch.stack([first == choice for choice in choices]).any(0).all()
    for state in states:
        assert torch.equal(state.last_tokens[slots], first)
