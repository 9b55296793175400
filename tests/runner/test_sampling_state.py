from __future__ import annotations

import numpy as np
import pytest
import torch

from gllm_engine.runner.sampler import sample
from gllm_engine.runner.sampling_state import Additions, SamplingState
from gllm_engine.runner.slot_table import PlanError, SlotTable
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import NewSequence

CPU = torch.device("cpu")


def make_state(num_slots: int) -> SamplingState:
    """With a vocabulary of 50 tokens."""
    return SamplingState(SlotTable(num_slots, 4, 8, 16, CPU), 50)


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
    state.set_owners([NewSequence(0, 0, 1, SamplingParams())])
    slots_cpu, slots = np.array([0]), torch.tensor([0])
    with pytest.raises(PlanError, match="slot 0: its token mask allows no token"):
        state.batch(slots_cpu, slots, {0: bytes(6) + b"\xfc" + b"\xff" * 9})
    batch = state.batch(slots_cpu, slots, {0: bytes(6) + b"\xfe"})
    assert sample(torch.zeros(1, 50), batch).tolist() == [49]


@pytest.mark.parametrize(("top_k", "kept"), [(0, 50), (-1, 50), (7, 7), (10**9, 50)])
def test_top_k_off_means_the_whole_vocabulary(top_k, kept):
    state = make_state(1)
    state.set_owners([NewSequence(0, 0, 1, SamplingParams(top_k=top_k))])
    batch = state.batch(np.array([0]), torch.tensor([0]), {})
    assert batch.top_k.tolist() == [kept]
    assert len(batch.truncations) == (kept < 50)  # no sorting where nothing is left out


def test_tokens_outside_the_vocabulary_are_harmless_in_biases_and_stops():
    state = make_state(1)
    sampling = SamplingParams(logit_bias={50: 1.0, -1: 1.0}, stop_token_ids=(99, -3), min_tokens=3)
    state.set_owners([NewSequence(0, 0, 1, sampling, (60,))])
    assert state.batch(np.array([0]), torch.tensor([0]), {}).added == ()
