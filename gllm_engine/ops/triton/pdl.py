"""Programmatic dependent launch: a kernel that begins while the one before it still runs.

A kernel launched with `overlapping()` calls `begin` or `begin_alone` once, in every program. Before
that it may read what no kernel writes (weights), and write nothing; after it, anything: several
kernels may be waiting, but each runs on only when the one before has ended and its writes are to be
seen. From CUDA's programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Hopper's and later GPUs can; where there is none (Triton's interpreter) nothing overlaps.
OVERLAP = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Let the next kernel begin, and wait until the one before has ended.

    For kernels that read much and long: the next one has time to ask for its weights.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def begin_alone(OVERLAPS: tl.constexpr):
    """Wait until the kernel before has ended, then let the next one begin.

    For short kernels: programs that wait behind them would take their place on the chip.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


def overlapping() -> dict[str, Any]:
    """Options of such a launch."""
    return {"launch_pdl": True} if OVERLAP else {}
