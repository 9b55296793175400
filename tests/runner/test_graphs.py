from __future__ import annotations

from bisect import bisect_left

import pytest

from gllm_engine.runner.graphs import row_counts


@pytest.mark.parametrize("max_rows", [1, 2, 63, 64, 100, 1024, 2048, 2049, 2500, 8192, 16_384])
def test_few_rows_of_a_decode_graph_are_spare(max_rows: int) -> None:
    counts = row_counts(max_rows)
    assert counts == sorted(set(counts)) and counts[-1] == max_rows
    for rows in range(64, max_rows + 1):
        size = counts[bisect_left(counts, rows)]
        assert size - rows < size / (5 if rows < 512 else 9), (rows, size)


def test_the_number_of_graphs_grows_slowly() -> None:
    assert [len(row_counts(n)) for n in (256, 1024, 2048, 8192, 16_384)] == [23, 39, 55, 71, 79]
