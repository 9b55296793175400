from __future__ import annotations

import torch

from gllm_engine.runner.slot_table import SlotTable
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched.cost import Work
from gllm_engine.types import Chunk, NewPages, NewSequence, StepPlan

CPU = torch.device("cpu")


def test_a_new_owner_empties_the_page_table():
    table = SlotTable(3, 4, 8, 16, CPU)
    new = [NewSequence(1, 0, 1, SamplingParams())]
    table.begin(StepPlan(1, new, [NewPages(1, 0, [8, 9]), NewPages(1, 2, [5])], [], []))
    assert table.page_table.tolist() == [[[0] * 4, [8, 9, 5, 0], [0] * 4]]
    table.lengths[1] = 33
    table.lengths_cpu[1] = 33
    table.begin(StepPlan(2, new, [NewPages(1, 0, [3])], [], []))
    assert table.page_table[0, 1].tolist() == [3, 0, 0, 0]
    assert (table.num_pages_cpu[0, 1], table.lengths_cpu[1], table.lengths[1].item()) == (1, 0, 0)


def test_the_work_of_a_step_is_what_the_scheduler_counts():
    table = SlotTable(4, 4, 16, 16, CPU)
    new = [NewSequence(slot, 0, 1, SamplingParams()) for slot in range(4)]
    pages = [NewPages(slot, 0, [3 * slot, 3 * slot + 1, 3 * slot + 2]) for slot in range(4)]
    chunks = [Chunk(slot, 0, [0] * length, True) for slot, length in ((0, 7), (1, 30), (2, 1))]
    rows = table.begin(StepPlan(1, new, pages, [], chunks))
    assert rows.work(chunks) == Work.row(0, 7).plus(Work.row(0, 30), Work.row(0, 1))
    chunks = [Chunk(2, 1, [0] * 5, False), Chunk(3, 0, [0] * 2, True)]
    rows = table.begin(StepPlan(2, [], [], [1, 0], chunks))
    more = Work.row(7, 1), Work.row(1, 5), Work.row(0, 2)
    assert rows.work(chunks) == Work.row(30, 1).plus(*more)
    rows = table.begin(StepPlan(3, [], [], [3], []))
    assert rows.work([]) == Work.row(2, 1)
