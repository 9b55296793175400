from __future__ import annotations

import numpy as np
import pytest
import torch

from gllm_engine.runner.sampler import sample
from gllm_engine.runner.state import Additions, PlanError, State, TokenCounts
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import NewPages, NewSequence

CPU = torch.device("cpu")


def test_count_rows_are_clean_when_reused_and_as_many_as_needed():
    counts = TokenCounts(num_slots=9, vocab=6, device=CPU)
    assert counts.output.shape == (0, 6)  # nothing until a slot needs it
    for slot in (4, 7, 2):
        counts.start(slot, [slot % 6, 1], [5, 5, slot % 6])
    for slot in (4, 7, 2):  # growing kept every row
        row = counts.rows_cpu[slot]
        expected = [2 if i == 5 else int(i == slot % 6) for i in range(6)]
        assert counts.output[row].tolist() == expected
        assert counts.in_prompt[row].nonzero().flatten().tolist() == sorted({slot % 6, 1})
    for slot in (4, 7, 2):
        counts.release(slot)
    for slot in (0, 1, 3, 8):
        counts.start(slot, [0], [])
        row = counts.rows_cpu[slot]
        assert counts.in_prompt[row].tolist() == [True] + [False] * 5
        assert not counts.output[row].any()
    assert len(counts.output) == 4


def test_count_rows_come_back_when_a_slot_needs_none_any_more():
    state = State(2, 4, 16, 50, (2,), CPU)
    with_penalty = SamplingParams(frequency_penalty=1.0)
    for _ in range(5):
        state.apply([NewSequence(0, 1, 1, with_penalty, [3])], [])
        state.apply([NewSequence(0, 1, 1, SamplingParams(), [])], [])
        state.apply([NewSequence(1, 1, 1, with_penalty, [3])], [])
    assert len(state.counts.output) == 2
    assert state.counts.rows_cpu[0] == -1 and len(state.counts.free) == 1


def test_additions_keep_short_rows_neutral_when_a_longer_one_comes():
    additions = Additions(3, CPU)
    additions.set(1, {7: 2.5})
    additions.set(0, {3: 1.0, 4: -1.0, 5: 0.5})
    additions.set(2, {})
    added = torch.zeros(3, 10).scatter_add_(1, additions.ids, additions.values)
    assert added[1].nonzero().flatten().tolist() == [7] and added[1, 7] == 2.5
    assert added[0].tolist() == [0, 0, 0, 1.0, -1.0, 0.5, 0, 0, 0, 0]
    assert not added[2].any()
    additions.set(0, {9: 1.0})
    added = torch.zeros(3, 10).scatter_add_(1, additions.ids, additions.values)
    assert added[0].nonzero().flatten().tolist() == [9]


def test_a_new_owner_empties_the_page_table():
    state = State(3, 4, 16, 50, (), CPU)
    new = [NewSequence(1, 0, 1, SamplingParams(), [])]
    state.apply(new, [NewPages(1, 0, [8, 9]), NewPages(1, 2, [5])])
    assert state.page_table.tolist() == [[0] * 4, [8, 9, 5, 0], [0] * 4]
    state.lengths[1] = 33
    state.lengths_cpu[1] = 33
    state.apply(new, [NewPages(1, 0, [3])])
    assert state.page_table[1].tolist() == [3, 0, 0, 0]
    assert (state.num_pages_cpu[1], state.lengths_cpu[1], state.lengths[1].item()) == (1, 0, 0)


def test_a_mask_that_allows_only_what_is_beyond_the_vocabulary_allows_nothing():
    state = State(1, 4, 16, 50, (), CPU)
    state.apply([NewSequence(0, 0, 1, SamplingParams(), [])], [])
    slots_cpu, slots = np.array([0]), torch.tensor([0])
    with pytest.raises(PlanError, match="slot 0: its token mask allows no token"):
        state.sampling_batch(slots_cpu, slots, {0: bytes(6) + b"\xfc" + b"\xff" * 9})
    batch = state.sampling_batch(slots_cpu, slots, {0: bytes(6) + b"\xfe"})
    assert sample(torch.zeros(1, 50), batch).tolist() == [49]


@pytest.mark.parametrize(("top_k", "kept"), [(0, 50), (-1, 50), (7, 7), (10**9, 50)])
def test_top_k_off_means_the_whole_vocabulary(top_k, kept):
    state = State(1, 4, 16, 50, (), CPU)
    state.apply([NewSequence(0, 0, 1, SamplingParams(top_k=top_k), [])], [])
    batch = state.sampling_batch(np.array([0]), torch.tensor([0]), {})
    assert batch.top_k.tolist() == [kept]
    assert len(batch.truncations) == (kept < 50)  # no sorting where nothing is left out


def test_tokens_outside_the_vocabulary_are_harmless_in_biases_and_stops():
    state = State(1, 4, 16, 50, (60,), CPU)
    sampling = SamplingParams(logit_bias={50: 1.0, -1: 1.0}, stop_token_ids=(99, -3), min_tokens=3)
    state.apply([NewSequence(0, 0, 1, sampling, [])], [])
    assert state.sampling_batch(np.array([0]), torch.tensor([0]), {}).added == ()
