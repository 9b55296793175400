"""All-reduce over a few GPUs of one node, fused with the residual sum and the RMS norm after it.

Each rank writes its part to a buffer that the other ranks can read, sets a flag on every rank,
waits for the flags of all ranks, and adds up all parts itself. It adds them in the order of ranks,
so the result has the same bits on every rank. One kernel replaces three, and one exchange replaces
the two of a ring: with the few rows of a decode step, exchanges cost time and bytes do not (a
one-shot all-reduce, as FasterTransformer's).

The program of a row waits for the programs of that row on the other ranks, so all programs of a
launch must fit the GPU at once. Buffers and flags are torch's symmetric memory, accessed by plain
peer pointers; NVLink multicast is not used.

The programs of one row on two ranks, in epoch e:

    rank 0                                          rank 1
    1. buffer 0 [e & 1, row] = own part             1. buffer 1 [e & 1, row] = own part
    2. flags 0 [from 0, row] = e (release)          2. flags 0 [from 1, row] = e (release)
       flags 1 [from 0, row] = e (release)             flags 1 [from 1, row] = e (release)
    3. wait for e in all of flags 0 [.., row]       3. wait for e in all of flags 1 [.., row]
    4. sum = buffer 0 [e & 1, row]                  4. sum = buffer 0 [e & 1, row]
           + buffer 1 [e & 1, row]                         + buffer 1 [e & 1, row]

A rank may be in epoch e + 1 while another rank still reads in step 4 of epoch e: the faster rank
then writes to the other half of its buffer. The faster rank cannot reach e + 2: step 3 of e + 1
needs the slower rank's flag e + 1, which that rank sets after step 4 of e. So a flag read in epoch
e is e - 1, e or e + 1, and two halves are enough. Epochs are 32-bit integers that wrap around. The
sign of the difference of two such close epochs tells which one is later, and the halves still
alternate, because 2^32 is even.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.batch import TensorGroup
from gllm_engine.ops.triton.launch_sizes import next_power_of_2
from gllm_engine.ops.triton.memory import load, load_wide

# One program per row. More rows would not fit the GPU at once, and NCCL is faster for them.
MAX_ROWS = 64
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _join(
    part, total, gain, normed, buffers, flags, epochs, dim, eps, rank,
    RANKS: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    # Launches that have summed this row, plus one; the same on every rank.
    epoch = tl.load(epochs + row) + 1
    place = ((epoch & 1) * ROWS + row).to(tl.int64) * dim
    mine = tl.load(buffers + rank).to(tl.pointer_type(KIND)) + place
    tl.store(mine + at, load(part + row * dim + at, inside), mask=inside)
    tl.debug_barrier()  # the whole row is written before the flags are set
    for peer in tl.static_range(RANKS):
        theirs = tl.load(flags + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + rank * ROWS + row, epoch, sem="release", scope="sys")
    ours = tl.load(flags + rank).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(RANKS):
        flag = ours + peer * ROWS + row
        # Not flag < epoch: epochs wrap around, but the difference of two close ones is right.
        while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - epoch < 0:
            pass
    tl.debug_barrier()
    y = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(RANKS):
        theirs = tl.load(buffers + peer).to(tl.pointer_type(KIND)) + place
        y += tl.load(theirs + at, mask=inside, other=0.0, volatile=True).to(tl.float32)
    y += load_wide(total + row * dim + at, inside)
    y = y.to(KIND)
    tl.store(total + row * dim + at, y, mask=inside)
    if NORM:
        wide = y.to(tl.float32)
        wide = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)).to(KIND).to(tl.float32)
        g = load_wide(gain + at, inside)
        tl.store(normed + row * dim + at, (wide * g).to(KIND), mask=inside)
    tl.store(epochs + row, epoch)


class OneShotAllReduce:
    """Adds all ranks' parts to the residual stream. All ranks must construct it together."""

    def __init__(
        self, ranks: TensorGroup, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self._rank, self._size, self._kind = ranks.rank, ranks.size, _DTYPES[dtype]
        group: Any = ranks.group
        self._buffer = symmetric.empty(2 * MAX_ROWS * dim, dtype=dtype, device=device)
        self._flags = symmetric.empty(ranks.size * MAX_ROWS, dtype=torch.int32, device=device)
        self._flags.zero_()
        self._epochs = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # the flags are zero before any rank gets their address
        peers = [
            symmetric.rendezvous(x, group.group_name).buffer_ptrs
            for x in (self._buffer, self._flags)
        ]
        self._peers = torch.tensor(peers, dtype=torch.int64, device=device)
        ranks.sum(torch.zeros(1, device=device))  # barrier: all ranks are ready

    def takes(self, part: Tensor) -> bool:
        return 0 < len(part) <= MAX_ROWS

    def __call__(
        self, part: Tensor, total: Tensor, norm: tuple[Tensor, float] | None
    ) -> Tensor | None:
        """Add all ranks' parts [rows, dim] to `total`; return norm(total) if `norm` is given."""
        rows, dim = part.shape
        gain, eps = (part, 0.0) if norm is None else norm
        normed = None if norm is None else torch.empty_like(part)
        block = next_power_of_2(dim)
        _join[(rows,)](
            part, total, gain, part if normed is None else normed, *self._peers, self._epochs,
            dim, eps, self._rank,
            RANKS=self._size, ROWS=MAX_ROWS, KIND=self._kind, BLOCK=block, NORM=norm is not None,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
        return normed


def make_one_shot_allreduce(
    ranks: TensorGroup, dim: int, dtype: torch.dtype
) -> OneShotAllReduce | None:
    """None if the kernel cannot run: a single rank, several nodes, or a dtype not of 16 bits."""
    if ranks.size == 1 or not ranks.same_node or dtype not in _DTYPES:
        return None
    return OneShotAllReduce(ranks, dim, dtype, torch.device("cuda", torch.cuda.current_device()))
