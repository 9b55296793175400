from __future__ import annotations

import torch

from gllm_engine.runner.slot_table import SlotTable
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import NewPages, NewSequence, StepPlan

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
