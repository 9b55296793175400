"""Programmatic dependent launch: a kernel that begins while the one before it still runs.

A kernel launched with `overlapping()` calls `begin` once, in every program. Before that it may read
what the kernel just before it does not write, and write nothing; after it, anything. No more than
two kernels overlap, because each lets the next one begin only when the one before it has ended.
From CUDA's programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Where there is no GPU (Triton's interpreter) there is nothing to overlap with.
OVERLAP = torch.cuda.is_available()


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Wait until the kernel before has ended, then let the next one begin."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


def overlapping() -> dict[str, Any]:
    """Options of such a launch."""
    return {"launch_pdl": True} if OVERLAP else {}
