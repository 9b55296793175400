"""Prefill chunks as causal rows, and their pages; pinned memory is plain memory here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_reference import make_case
from torch import Tensor

from gllm_engine.ops import prefill_rows as module
from gllm_engine.ops.batch import Batch
from gllm_engine.ops.prefill_rows import ListedPages, PrefillRows, are_short, prefill_rows

PAGE = 4
# (context, tokens in the step): two decode rows, then prefill chunks.
STEP = [(9, 1), (3, 1), (5, 5), (16, 16), (21, 4), (40, 17), (30, 30), (8, 8)]


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


@pytest.fixture
def batch() -> Batch:
    return make_case(STEP, PAGE, 1)[0]


def test_rows_that_see_everything_before_them(batch: Batch) -> None:
    rows = prefill_rows(batch, None)
    assert rows.slots.tolist() == [2, 3, 4, 5, 6, 7]
    assert rows.query_lens.tolist() == [5, 16, 4, 17, 30, 8]
    assert rows.ends.tolist() == [5, 16, 21, 40, 30, 8]
    assert rows.begins.tolist() == [0] * 6
    assert rows.num_paged == 4  # the last two begin their sequences
    assert rows.up_to(4).slots.tolist() == [2, 3, 4, 5]
    fresh = replace(batch, num_decode=6)
    assert prefill_rows(fresh, None).num_paged == 0


@pytest.mark.parametrize(
    ("rows", "heads", "even", "busiest"),
    [
        # One program is busy, with a tile of 128 queries.
        ([(8000, 128)], 32, 8000 * 32 / 132, 8000),
        ([(8000, 64)], 32, 8000 * 16 / 132, 8000),
        ([(8000, 128)], 8, 8000 * 8 / 132, 8000),
        ([(128, 128), (8000, 128)], 32, 8128 * 32 / 132, 8000),
        # All programs are busy: with tiles that are full, or not.
        ([(8000, 256)] * 16, 32, 8000 * 1024 / 132, 8000 * 1024 / 132),
        ([(8000, 129)] * 16, 32, 8000 * 516 / 132, 8000 * 1024 / 132),
        ([(8000, 16)] * 16, 32, 8000 * 64 / 132, 8000 * 512 / 132),
    ],
)
def test_short_chunks(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[int, int]],
    heads: int,
    even: float,
    busiest: float,
) -> None:
    """Times are in tokens of the context of one tile. Tokens that a row does not see count for
    nothing.
    """
    ends, lens = np.array(rows).T
    unseen = np.full_like(ends, 5000)
    made = PrefillRows(torch.arange(len(rows)), lens, ends + unseen, unseen)
    for itemsize in (1, 2):
        for more in (1, -1):
            slowness = (busiest - module._DIVIDING + more) / even * itemsize
            monkeypatch.setattr(module, "_SLOWNESS", slowness)
            assert are_short(made, heads, itemsize) == (more < 0)


@pytest.mark.parametrize("chunk", [4, 8, 16, 64])
def test_rows_are_cut_where_chunks_of_the_sequence_begin(batch: Batch, chunk: int) -> None:
    rows = prefill_rows(batch, chunk)
    columns = (rows.slots, rows.query_lens, rows.ends, rows.begins)
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    seen = []
    for slot, num, end, begin in found:
        assert begin % chunk == 0 and begin < end <= begin + chunk and end - num >= begin
        seen += [(slot, position) for position in range(end - num, end)]
    # All tokens of the step, in their order.
    assert seen == [
        (row, position)
        for row, (context, num) in enumerate(STEP)
        if row >= batch.num_decode
        for position in range(context - num, context)
    ]
    paged = [end - num > begin for _, num, end, begin in found]
    assert not any(paged[rows.num_paged :])
    assert rows.num_paged == 0 or paged[rows.num_paged - 1]


@pytest.mark.parametrize(("chunk", "window"), [(None, 0), (None, 6), (8, 0), (16, 0)])
def test_pages_from_the_first_that_a_row_sees(batch: Batch, chunk: int | None, window: int) -> None:
    rows = prefill_rows(batch, chunk)
    pages = ListedPages(rows, PAGE, window)
    starts, firsts = pages.to(torch.device("cpu"))
    counts = starts.diff().tolist()
    for i, (num, end, begin) in enumerate(
        zip(rows.query_lens, rows.ends, rows.begins, strict=True)
    ):
        first = max(begin, end - num - window + 1) if window else begin
        assert firsts[i] == first // PAGE
        assert (firsts[i] + counts[i] - 1) * PAGE + pages.lasts[i] == end
        assert 1 <= pages.lasts[i] <= PAGE
    assert pages.longest == max(counts)
