"""Sizes of launches: how many programs, and how many numbers each has. For the host alone."""

from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. triton.cdiv takes over a microsecond, as kernels may call it too."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of 2 that is not less than x, at least 1; like cdiv in place of Triton's."""
    return 1 << max(x - 1, 0).bit_length()
