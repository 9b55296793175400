"""How kernels load and store, and tell programs apart."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program(axis: tl.constexpr):
    """The number of a program, for places in tensors of more than 2^31 numbers."""
    return tl.program_id(axis).to(tl.int64)


@triton.jit
def own_range(axis: tl.constexpr, SIZE: tl.constexpr):
    """The numbers of a program along an axis, if each program has SIZE of them."""
    return tl.program_id(axis) * SIZE + tl.arange(0, SIZE)


@triton.jit
def load(place, inside):
    """Floating-point numbers; zeros unless `inside`."""
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def load_wide(place, inside):
    """As load, in float32."""
    return load(place, inside).to(tl.float32)


@triton.jit
def store_rounded(place, x, inside):
    """Store x, if `inside`, in the dtype of the memory."""
    tl.store(place, x.to(place.dtype.element_ty), mask=inside)


@triton.jit
def stored(x, kind: tl.constexpr):
    """x as a cache of `kind` holds it. float8_e4m3fn has no infinity: 448 is its largest number."""
    if kind == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(kind)
