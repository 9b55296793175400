"""Prefill chunks as causal rows, and their pages; pinned memory is plain memory here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_reference import make_case
from torch import Tensor

from gllm_engine.ops import prefill_rows as module
from gllm_engine.ops.batch import Batch
from gllm_engine.ops.prefill_rows import ListedPages, are_short, prefill_rows

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


def test_short_chunks(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """On average over the tokens of contexts."""
    rows = prefill_rows(batch, None).up_to(4)
    mean = (5 * 5 + 16 * 16 + 4 * 21 + 17 * 40) / (5 + 16 + 21 + 40)
    monkeypatch.setattr(module, "_SHORT", mean + 0.01)
    assert are_short(rows)
    monkeypatch.setattr(module, "_SHORT", mean - 0.01)
    assert not are_short(rows)


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
