"""The end of a matrix product's tile: the sum of its parts, bias, activation and residual.

With too few tiles to keep the GPU busy, several programs share a tile, and each program
takes one part of its depth (split-K). Here a tile has 4 parts, and part 1 is the last to finish:

    depth           |-- part 0 --|-- part 1 --|-- part 2 --|-- part 3 --|    of tile t
                          |            |            |            |
    store in sums     partial 0    partial 1    partial 2    partial 3       float32
                          |            |            |            |
    arrived[t]         0 -> 1       3 -> 4       1 -> 2       2 -> 3         atomic add,
                                       |                                     acquire and release
                          the old value is PARTS - 1: part 1 arrived last
                          sets arrived[t] back to 0 for the next launch
                          adds partials 0, 1, 2, 3 and writes the tile of the output

The partials are always added in the order of the depth, so the result does not depend on which part
arrives last. No program waits for another one. A tile of one part is written directly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.triton.memory import load_wide, store_rounded

# Most tiles that several programs share.
_TILES = 1024
_arrived: dict[torch.device, Tensor] = {}


@triton.jit
def _store(
    y, z, bias, out, n, m, rows, width,
    GATED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Store the float32 sums y (and z, the up half, if GATED), [n, m], at out[m, n]."""
    kind: tl.constexpr = out.dtype.element_ty
    if bias is not None:
        y += load_wide(bias + n, n < width)[:, None]
    if GATED:
        if bias is not None:
            z += load_wide(bias + width + n, n < width)[:, None]
        y = y.to(kind).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32) * z.to(kind).to(tl.float32)
    place = out + m[None, :].to(tl.int64) * width + n[:, None]
    inside = (m < rows)[None, :] & (n < width)[:, None]
    if ADD:
        y += load_wide(place, inside)
    store_rounded(place, y, inside)


@triton.jit
def _arrive(y, z, sums, at, arrived, part, PARTS: tl.constexpr, GATED: tl.constexpr):
    """Store the partial sums of a part; whether all other parts of the tile have done so."""
    SIZE: tl.constexpr = y.shape[0] * y.shape[1]
    tl.store(sums + part * SIZE + at, y)
    if GATED:
        tl.store(sums + (PARTS + part) * SIZE + at, z)
    tl.debug_barrier()  # all threads have stored their partial before the arrival
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    tl.debug_barrier()
    return before == PARTS - 1


@triton.jit
def _join(sums, at, PARTS: tl.constexpr):
    """The sum of all parts."""
    SIZE: tl.constexpr = at.shape[0] * at.shape[1]
    y = tl.zeros(at.shape, tl.float32)
    for i in tl.static_range(PARTS):
        y += tl.load(sums + i * SIZE + at, cache_modifier=".cg")
    return y


@triton.jit
def finish_tile(
    y, z, sums, arrived, tile, part, bias, out, n, m, rows, width,
    PARTS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """As _store, of the sum over all parts of a tile, once all parts have called this.

    `sums`, `arrived`: from shared_sums.
    """
    last = True
    if PARTS > 1:
        N: tl.constexpr = y.shape[0]
        M: tl.constexpr = y.shape[1]
        at = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
        sums += tile * PARTS * (1 + GATED) * N * M
        last = _arrive(y, z, sums, at, arrived + tile, part, PARTS, GATED)
    if last:
        if PARTS > 1:
            tl.store(arrived + tile, 0)
            y = _join(sums, at, PARTS)
            if GATED:
                z = _join(sums + PARTS * N * M, at, PARTS)
        _store(y, z, bias, out, n, m, rows, width, GATED, ADD)


def num_parts(tiles: int, programs: int, depth: int, least: int) -> int:
    """The least number of parts, a power of two, with which `tiles` take `programs` programs, as
    long as each part of `depth` has a depth of `least`.
    """
    parts = 1
    while tiles * parts < programs and depth >= 2 * parts * least:
        parts *= 2
    return parts


def shared_sums(out: Tensor, tiles: int, parts: int, size: int) -> tuple[Tensor, Tensor]:
    """(the memory for partial sums, the arrival counters) of programs that share `tiles`.

    `size`: the number of sums of a program. Two streams of one device must not share tiles at once:
    they would share the counters.
    """
    if parts == 1:
        return out, out
    assert tiles <= _TILES
    if out.device not in _arrived:
        _arrived[out.device] = torch.zeros(_TILES, dtype=torch.int32, device=out.device)
    return out.new_empty(tiles * parts * size, dtype=torch.float32), _arrived[out.device]
