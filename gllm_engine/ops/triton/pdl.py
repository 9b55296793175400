"""Programmatic dependent launch: a kernel starts while the stream's previous kernel still runs.

A kernel launched with `overlapping()` calls `begin` or `begin_alone` exactly once in every program.
The part of the kernel before that call is its prologue.

    kernel A   [prologue|begin|body .................]
    kernel B                  [prologue|begin, waits .|body .............]
    kernel C                                  [prologue|begin, waits .....|body ......]
    time ->                                           ^ A has ended: its writes are visible to B

    prologue   may read memory that no kernel writes (weights); writes nothing. If the previous
               kernel calls begin_alone, all kernels before that one have ended, and the prologue
               may read what they wrote
    begin      lets the next kernel start, then waits until the previous kernel has ended
    body       may read and write anything

Several kernels may wait at once, but bodies never overlap: B's wait ends after all of A, and C's
wait ends after all of B. Therefore no program may skip the call. See "Programmatic Dependent Launch
and Synchronization" in CUDA's programming guide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Hopper and later GPUs support it. Elsewhere (Triton's interpreter) kernels do not overlap.
OVERLAP = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
ON_GPU = tl.constexpr(OVERLAP)  # the same, for kernels


@triton.jit
def begin():
    """Let the next kernel start, then wait until the previous kernel has ended.

    For long kernels: the next kernel has time to load its weights in its prologue.
    """
    if ON_GPU:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def begin_alone():
    """Wait until the previous kernel has ended, then let the next kernel start.

    For short kernels: waiting programs of the next kernel would take up their multiprocessors.
    """
    if ON_GPU:
        gdc_wait()
        gdc_launch_dependents()


def overlapping() -> dict[str, Any]:
    """Launch options of a kernel that calls `begin` or `begin_alone`."""
    return {"launch_pdl": True} if OVERLAP else {}
