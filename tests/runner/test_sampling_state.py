from __future__ import annotations

import numpy as np
import pytest
import torch

from gllm_engine.runner.sampler import sample
from gllm_engine.runner.sampling_state import Additions, SamplingState, TokenCounts
from gllm_engine.runner.slot_table import PlanError, SlotTable
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import NewSequence

CPU = torch.device("cpu")


def make_state(num_slots: int, eos: tuple[int, ...] = ()) -> SamplingState:
    """With a vocabulary of 50 tokens."""
    return SamplingState(SlotTable(num_slots, 4, 16, CPU), 50, eos)


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
    state = make_state(2, (2,))
    with_penalty = SamplingParams(frequency_penalty=1.0)
    for _ in range(5):
        state.set_owners([NewSequence(0, 1, 1, with_penalty, [3])])
        state.set_owners([NewSequence(0, 1, 1, SamplingParams(), [])])
        state.set_owners([NewSequence(1, 1, 1, with_penalty, [3])])
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


def test_a_mask_that_allows_only_what_is_beyond_the_vocabulary_allows_nothing():
    state = make_state(1)
    state.set_owners([NewSequence(0, 0, 1, SamplingParams(), [])])
    slots_cpu, slots = np.array([0]), torch.tensor([0])
    with pytest.raises(PlanError, match="slot 0: its token mask allows no token"):
        state.batch(slots_cpu, slots, {0: bytes(6) + b"\xfc" + b"\xff" * 9})
    batch = state.batch(slots_cpu, slots, {0: bytes(6) + b"\xfe"})
    assert sample(torch.zeros(1, 50), batch).tolist() == [49]


@pytest.mark.parametrize(("top_k", "kept"), [(0, 50), (-1, 50), (7, 7), (10**9, 50)])
def test_top_k_off_means_the_whole_vocabulary(top_k, kept):
    state = make_state(1)
    state.set_owners([NewSequence(0, 0, 1, SamplingParams(top_k=top_k), [])])
    batch = state.batch(np.array([0]), torch.tensor([0]), {})
    assert batch.top_k.tolist() == [kept]
    assert len(batch.truncations) == (kept < 50)  # no sorting where nothing is left out


def test_tokens_outside_the_vocabulary_are_harmless_in_biases_and_stops():
    state = make_state(1, (60,))
    sampling = SamplingParams(logit_bias={50: 1.0, -1: 1.0}, stop_token_ids=(99, -3), min_tokens=3)
    state.set_owners([NewSequence(0, 0, 1, sampling, [])])
    assert state.batch(np.array([0]), torch.tensor([0]), {}).added == ()
