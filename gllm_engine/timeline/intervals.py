"""Arithmetic of times: a list of (begin, end) that are in order, not empty and do not touch.

Pure functions, in time proportional to the lengths of the lists.
"""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[int, int]
Times = list[Interval]


def union(parts: Iterable[Interval]) -> Times:
    """The times that any of `parts` covers; they may overlap, in any order."""
    joined: Times = []
    for begin, end in sorted(parts):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        elif begin < end:
            joined.append((begin, end))
    return joined


def overlap(a: Times, b: Times) -> Times:
    """The times in both."""
    found: Times = []
    i = 0
    j = 0
    while i < len(a) and j < len(b):
        begin = max(a[i][0], b[j][0])
        end = min(a[i][1], b[j][1])
        if begin < end:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def minus(a: Times, b: Times) -> Times:
    """The times in `a` that are not in `b`."""
    if not a:
        return []
    low = a[0][0]
    high = a[-1][1]
    edges = [low, *(edge for times in b for edge in times), high]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return overlap(a, [(begin, end) for begin, end in gaps if begin < end])


def length(times: Times) -> int:
    return sum([end - begin for begin, end in times])
