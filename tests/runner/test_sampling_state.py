from __future__ import annotations

import numpy as np
import pytest
import torch

from gllm_engine.arch import MAX_EOS_TOKEN_IDS
from gllm_engine.runner.sampler import sample
from gllm_engine.runner.sampling_state import Additions, SamplingState
from gllm_engine.runner.slot_table import PlanError, SlotTable
from gllm_engine.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams
from gllm_engine.types import Chunk, NewSequence, StepPlan

CPU = torch.device("cpu")


def make_state(num_slots: int) -> SamplingState:
    """With a vocabulary of 50 tokens."""
    return SamplingState(SlotTable(num_slots, 4, 8, 16, CPU), 50)


def added(additions: Additions, slots: list[int]) -> torch.Tensor:
    """What is added to logits of 10 tokens, [slots, 10]."""
    ids, values = additions.of(np.array(slots), torch.tensor(slots))
    return torch.zeros(len(slots), 10).scatter_add_(1, ids, values)


def test_additions_keep_short_rows_neutral_beside_longer_ones():
    additions = Additions(3, 4, CPU)
    additions.set(1, {7: 2.5})
    additions.set(0, {3: 1.0, 4: -1.0, 5: 0.5})
    additions.set(2, {})
    assert added(additions, [2, 0, 1]).tolist() == [
        [0.0] * 10,
        [0, 0, 0, 1.0, -1.0, 0.5, 0, 0, 0, 0],
        [0] * 7 + [2.5, 0, 0],
    ]
    additions.set(0, {9: 1.0})
    assert added(additions, [0, 1]).tolist() == [[0] * 9 + [1.0], [0] * 7 + [2.5, 0, 0]]


def test_additions_take_no_memory_after_the_start_and_cost_what_a_step_uses():
    additions = Additions(2, 4, CPU)
    before = [tensor.data_ptr() for tensor in (additions.ids, additions.values)]
    additions.set(0, dict.fromkeys(range(4), 1.0))
    additions.set(1, {5: 2.0})
    assert [tensor.data_ptr() for tensor in (additions.ids, additions.values)] == before
    # A long list of one sequence does not widen the rows of others.
    assert additions.of(np.array([1]), torch.tensor([1]))[0].shape == (1, 1)
    with pytest.raises(PlanError, match="slot 0: values for 5 tokens, at most 4 fit"):
        additions.set(0, dict.fromkeys(range(5), 1.0))


def test_every_list_that_a_request_may_have_fits():
    vocab = 3000
    state = SamplingState(SlotTable(1, 4, 8, 16, CPU), vocab)
    sampling = SamplingParams(
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0),
        stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS)),
        min_tokens=3,
    )
    eos = tuple(range(MAX_STOP_TOKEN_IDS, MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS + 1))
    state.set_owners([NewSequence(0, 0, 1, sampling, eos)])
    bias, stops = state.batch(np.array([0]), torch.tensor([0]), {}).added
    assert bias[1].shape == (1, MAX_LOGIT_BIAS)
    assert stops[1].shape == (1, MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS + 1)


def test_a_mask_that_allows_only_what_is_beyond_the_vocabulary_allows_nothing():
    state = make_state(1)
    state.set_owners([NewSequence(0, 0, 1, SamplingParams())])
    for useless in (bytes(6) + b"\xfc" + b"\xff" * 9, bytes(7), b""):
        with pytest.raises(PlanError, match="slot 0: its token mask allows no token"):
            state.check_masks(StepPlan(1, [], [], [0], [], {0: useless}))
    for last in (49, 0):
        mask = (1 << last).to_bytes(7, "little")
        state.check_masks(StepPlan(1, [], [], [0], [], {0: mask}))
        batch = state.batch(np.array([0]), torch.tensor([0]), {0: mask})
        assert sample(torch.zeros(1, 50), batch).tolist() == [last]
    state.check_masks(StepPlan(1, [], [], [0], [], {0: b"\x01"}))  # a short mask bans the rest


def test_a_mask_of_a_slot_that_samples_nothing_is_refused():
    state = make_state(2)
    unfinished = Chunk(1, 0, [4], samples=False)
    for plan in (
        StepPlan(1, [], [], [0], [unfinished], {1: b"\xff"}),
        StepPlan(1, [], [], [], [unfinished], {1: b"\xff"}),
        StepPlan(1, [], [], [], [], {1: b"\xff"}),
    ):
        with pytest.raises(PlanError, match="slot 1: a token mask, but no token is sampled for it"):
            state.check_masks(plan)


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
