from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_sampler import SlowRow, acceptable, uniform

from gllm_engine.ops.reference import draw, first_above, uniforms
from gllm_engine.runner.sampler import SamplingBatch, log_probabilities, sample
from gllm_engine.runner.sampling_state import SamplingState
from gllm_engine.runner.slot_table import SlotTable
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import NewSequence

CPU = torch.device("cpu")


PAGE_SIZE, MAX_PAGES = 3, 4


def fast(
    logits: np.ndarray,
    rows: list[SlowRow],
    eos: tuple[int, ...] = (),
    order: list[int] | None = None,
) -> list[int]:
    """Sample all rows in one batch; row i lives in slot order[i]."""
    slots = order or list(range(len(rows)))
    table = make_table(slots, [row.prompt + row.output for row in rows])
    sampling = SamplingState(table, logits.shape[1])
    sampling.set_owners(
        [
            NewSequence(slot, row.seed, len(row.prompt), row.sampling, eos)
            for slot, row in zip(slots, rows, strict=True)
        ]
    )
    masks = {s: row.mask for s, row in zip(slots, rows, strict=True) if row.mask is not None}
    batch = sampling.batch(np.array(slots), torch.tensor(slots), masks)
    return sample(torch.tensor(logits, dtype=torch.float32), batch).tolist()


def make_table(slots: list[int], known: list[list[int]]) -> SlotTable:
    """After a step that has computed all `known` tokens of the slots' sequences."""
    num_slots = max(slots) + 1
    table = SlotTable(num_slots, MAX_PAGES, num_slots * MAX_PAGES, PAGE_SIZE, CPU)
    table.page_table[0] = torch.randperm(num_slots * MAX_PAGES).view(num_slots, MAX_PAGES)
    for slot, tokens in zip(slots, known, strict=True):
        places = table.page_table[0, slot, :, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
        table.cached_tokens[places.flatten()[: len(tokens)]] = torch.tensor(tokens)
        table.lengths[slot] = table.lengths_cpu[slot] = len(tokens)
    return table


@st.composite
def sampling_params(draw_: st.DrawFn, vocab: int) -> SamplingParams:
    def sometimes(values: st.SearchStrategy, default: object) -> object:
        return draw_(st.one_of(st.just(default), values))

    token = st.integers(0, vocab - 1)
    return SamplingParams(
        temperature=sometimes(st.floats(0.05, 5.0), 0.0),
        top_k=sometimes(st.integers(1, 2 * vocab), 0),
        top_p=sometimes(st.floats(1e-6, 0.999), 1.0),
        min_p=sometimes(st.floats(0.0, 1.0), 0.0),
        presence_penalty=sometimes(st.floats(-2, 2), 0.0),
        frequency_penalty=sometimes(st.floats(-2, 2), 0.0),
        repetition_penalty=sometimes(st.floats(0.25, 4), 1.0),
        logit_bias=sometimes(st.dictionaries(token, st.floats(-100, 100), max_size=5), {}),
        min_tokens=draw_(st.integers(0, 3)),
        stop_token_ids=tuple(draw_(st.lists(token, max_size=2))),
        max_tokens=None,
    )


@st.composite
def cases(draw_: st.DrawFn) -> tuple[np.ndarray, list[SlowRow], tuple[int, ...]]:
    vocab = draw_(st.sampled_from([9, 40, 129, 300]))
    token = st.integers(0, vocab - 1)
    rows = []
    for _ in range(draw_(st.integers(1, 5))):
        allowed = draw_(st.one_of(st.none(), st.sets(token, min_size=1, max_size=8)))
        rows.append(
            SlowRow(
                draw_(sampling_params(vocab)),
                draw_(st.integers(-(2**63), 2**63 - 1)),
                draw_(st.lists(token, min_size=1, max_size=5)),
                draw_(st.lists(token, max_size=5)),
                None if allowed is None else pack(allowed, vocab),
            )
        )
    # Half steps make equal logits common, so that ties are tested.
    noise = np.random.default_rng(draw_(st.integers(0, 2**32 - 1))).normal(0, 4, (len(rows), vocab))
    logits = np.round(noise * 2) / 2 if draw_(st.booleans()) else noise.astype(np.float32)
    return logits, rows, (draw_(token),)


def pack(allowed: set[int], vocab: int) -> bytes:
    bits = np.zeros(vocab, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_feature_agrees_with_the_slow_twin(case):
    logits, rows, eos = case
    for i, token in enumerate(fast(logits, rows, eos)):
        assert token in acceptable(logits[i], rows[i], eos), (i, rows[i])


def test_rows_with_penalties_and_masks_in_parts(monkeypatch):
    """As in one part: few numbers and few tokens are worked on at once."""
    vocab, rng = 40, np.random.default_rng(4)
    logits = rng.normal(0, 3, (9, vocab))
    rows = [
        SlowRow(
            SamplingParams(temperature=0, presence_penalty=1.5, repetition_penalty=1 + i % 3),
            prompt=rng.integers(0, vocab, 6).tolist(),
            output=rng.integers(0, vocab, i % 6).tolist(),
            mask=pack(set(rng.integers(0, vocab, 30).tolist()), vocab),
        )
        for i in range(len(logits))
    ]
    whole = fast(logits, rows)
    monkeypatch.setattr("gllm_engine.runner.sampler.MAX_AT_ONCE", 2 * vocab)
    monkeypatch.setattr("gllm_engine.runner.token_history.MAX_LOOKED_UP", 5)
    assert fast(logits, rows) == whole
    for i, token in enumerate(whole):
        assert token in acceptable(logits[i], rows[i])


@settings(max_examples=60, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_a_row_gets_the_same_token_alone_and_in_any_slot(case, random):
    logits, rows, eos = case
    slots = list(range(len(rows) + 3))
    random.shuffle(slots)
    together = fast(logits, rows, eos, slots[: len(rows)])
    alone = [fast(logits[i : i + 1], [row], eos)[0] for i, row in enumerate(rows)]
    assert together == alone


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**24))
def test_uniforms_are_splitmix64(seed, position):
    u = uniforms(torch.tensor([seed]), torch.tensor([position]))
    assert u.item() == uniform(seed, position)
    assert 0 <= u.item() < 1


def test_the_hash_is_the_published_splitmix64():
    # First outputs of the reference implementation for state 0 (mixing seed 0 gives 0).
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    u = uniforms(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert u.tolist() == [(x >> 11) / 2**53 for x in first]


def test_seeds_and_positions_give_independent_uniforms():
    seeds = torch.arange(300).repeat_interleave(300)
    u = uniforms(seeds, torch.arange(300).repeat(300)).view(300, 300)
    for sums in (u.mean(0), u.mean(1)):  # the mean of 300 uniforms has deviation 1/60
        assert (sums - 0.5).abs().max() < 5 / 60
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.2, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    ],
)
def test_the_sampled_distribution_is_right(params):
    """Pearson's chi-square against the twin's distribution; the limit is 5 deviations."""
    from slow_sampler import distribution

    num_draws, vocab = 20000, 200
    logits = np.random.default_rng(1).normal(0, 1.5, vocab).astype(np.float32)
    sampling = SamplingParams(**params)
    tokens = []
    for first in range(0, num_draws, 2000):
        rows = [SlowRow(sampling, seed=first + i) for i in range(2000)]
        tokens += fast(np.tile(logits, (2000, 1)), rows)
    counts = np.bincount(tokens, minlength=vocab)
    expected = distribution(logits.astype(np.float64), sampling) * num_draws
    assert not counts[expected == 0].any()
    common = expected > 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_draw_never_returns_a_token_of_weight_zero_nor_leaves_the_vocabulary():
    edge = torch.tensor([0.0, 0.5, 1 - 2.0**-53, 1 - 2.0**-24], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 2, 127, 128, 129, 5000):
        weights = torch.rand(64, vocab, generator=generator).exp() ** 30
        weights[torch.rand(64, vocab, generator=generator) < 0.7] = 0
        weights[torch.arange(64), torch.randint(vocab, (64,), generator=generator)] = 1e-30
        tokens = draw(weights, edge.repeat(16))
        assert ((tokens >= 0) & (tokens < vocab)).all()
        assert (weights.gather(1, tokens[:, None]) > 0).all()


def test_draw_at_the_ends_takes_the_first_and_the_last_possible_token():
    weights = torch.zeros(2, 1000)
    weights[:, [3, 500, 996]] = 1.0
    assert draw(weights, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [
        3,
        996,
    ]


@pytest.mark.parametrize(
    ("target", "index"), [(-1e-18, 2), (0.0, 2), (0.999, 2), (1.0, 3), (2.9, 3), (3.0, 3), (3.1, 3)]
)
def test_rounding_of_the_target_never_reaches_a_weight_of_zero(target, index):
    weights = torch.tensor([[0.0, 0.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    found = first_above(weights, weights.cumsum(1), torch.tensor([[target]], dtype=torch.float64))
    assert found.tolist() == [[index]]


def test_one_token_left_is_chosen_whatever_else_is_asked():
    vocab, rows = 50, []
    for sampling in (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1e-4, top_p=1e-9),
        SamplingParams(temperature=100.0, min_p=1.0),
        SamplingParams(top_k=2**40, top_p=0.5, repetition_penalty=1e-9),
        SamplingParams(logit_bias={7: -100.0}, presence_penalty=2.0, frequency_penalty=2.0),
        SamplingParams(stop_token_ids=(7,), min_tokens=5),  # the mask outweighs min_tokens
    ):
        rows.append(SlowRow(sampling, prompt=[7, 8], output=[7], mask=pack({7}, vocab)))
    logits = np.random.default_rng(0).normal(0, 50, (len(rows), vocab))
    assert fast(logits, rows) == [7] * len(rows)


def test_min_p_one_keeps_only_the_likeliest_tokens():
    logits = np.zeros((200, 30))
    logits[:, [4, 9]] = 1.0
    tokens = fast(logits, [SlowRow(SamplingParams(min_p=1.0), seed=i) for i in range(200)])
    assert set(tokens) == {4, 9}


def test_equal_logits_at_the_top_k_boundary_all_stay():
    logits = np.zeros((400, 30))
    logits[:, 3] = 1.0
    logits[:, [5, 20]] = 0.5
    tokens = fast(logits, [SlowRow(SamplingParams(top_k=2), seed=i) for i in range(400)])
    assert set(tokens) == {3, 5, 20}


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])  # flat needs a full sort, peaked does not
@pytest.mark.parametrize("vocab", [1025, 3000])
def test_partial_and_full_sorts_in_one_batch(spread, vocab):
    params = [
        {"top_k": 7, "top_p": 0.8},
        {"top_p": 0.3},
        {"top_p": 0.97},
        {"top_k": 1024},
        {"top_k": vocab - 1, "top_p": 0.5},
        {"top_k": vocab - 1},
        {"top_k": 1100, "top_p": 0.3},  # a share of the 1100, not of all
    ]
    rows = [SlowRow(SamplingParams(**one), seed=s) for s in range(8) for one in params]
    logits = np.random.default_rng(3).normal(0, spread, (len(rows), vocab)).astype(np.float32)
    both = fast(logits, rows)
    for i, row in enumerate(rows):
        assert both[i] in acceptable(logits[i], row)
        assert both[i] == fast(logits[i : i + 1], [row])[0]


def test_log_probabilities_are_raw_and_ranked():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 7, 49, 3, 3, 12])
    ids, scores, ranks = log_probabilities(logits, tokens, 5)
    expected = logits.double().log_softmax(-1)
    order = expected.argsort(descending=True)
    assert ids[:, 0].tolist() == tokens.tolist()
    assert ids[:, 1:].tolist() == order[:, :5].tolist()
    torch.testing.assert_close(scores.double(), expected.gather(1, ids), atol=1e-5, rtol=1e-5)
    places = (order == tokens[:, None]).int().argmax(1) + 1
    assert ranks[:, 0].tolist() == places.tolist()
    assert ranks[:, 1:].tolist() == [[1, 2, 3, 4, 5]] * 6


def test_log_probabilities_of_a_vocabulary_smaller_than_asked():
    ids, scores, ranks = log_probabilities(torch.zeros(1, 3), torch.tensor([2]), 20)
    assert ids.shape == scores.shape == ranks.shape == (1, 4)
    assert ranks[0, 0] == 1  # equal tokens share the better rank


def test_a_greedy_batch_draws_nothing():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    ones = torch.ones(1)
    batch = SamplingBatch(
        temperature=torch.zeros(1),
        min_p=torch.zeros(1),
        top_p=ones.double(),
        top_k=torch.tensor([3]),
        seeds=torch.zeros(1, dtype=torch.int64),
        output_lens=torch.zeros(1, dtype=torch.int64),
        has_random=False,
        has_greedy=True,
        has_min_p=False,
    )
    assert sample(logits, batch).tolist() == [1]
