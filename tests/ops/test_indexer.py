"""The indexer's operations: the reference against a naive one, kernels against the reference.

Kernels run in Triton's interpreter or on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import DEVICES
from test_latent_attention import near, plain_up, to_device
from test_reference import make_case
from torch import Tensor

from gllm_engine.attention_shape import LatentShape
from gllm_engine.ops import Batch, IndexQueries, PagedPlan, RotaryInputs, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
PAGE = 16
# (context after the step, tokens in the step) of each row; decode rows come first.
MIXES = {
    "decode": [(1, 1), (17, 1), (33, 1), (300, 1), (12, 1), (13, 1)],
    "chunks": [(5, 5), (21, 4), (40, 17)],
    "both": [(300, 1), (16, 1), (19, 19), (33, 6)],
}
# heads, dim, top_k
SHAPES = [(16, 32, 12), (5, 24, 1), (20, 40, 31)]


def make_step(mix: str, dim: int) -> tuple[Batch, Tensor]:
    """A batch, and a cache of keys that holds NaN where no earlier step has written."""
    rows = MIXES[mix]
    batch, _, kv = make_case(rows, PAGE, 1, 7, dim)
    num_decode = next((i for i, (_, n) in enumerate(rows) if n > 1), len(rows))
    return replace(batch, num_decode=num_decode), kv[:, :1].contiguous()


def whole_numbers(*shape: int) -> Tensor:
    """Small whole numbers: products are exact, and many scores are equal."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(5)).float()


def make_queries(tokens: int, heads: int, dim: int, equal: bool) -> IndexQueries:
    if equal:
        return IndexQueries(whole_numbers(tokens, heads, dim), whole_numbers(tokens, heads))
    return IndexQueries(torch.randn(tokens, heads, dim), torch.randn(tokens, heads))


def plan_for(batch: Batch, cache: Tensor, top_k: int) -> reference.ReferencePlan:
    planner = reference.make_planner(torch.device("cpu"), torch.float32)
    return planner.plan_latent(batch, cache, LatentShape(1, 1, 1, 0.2, 1, top_k))


def lengths_of(batch: Batch) -> list[int]:
    """Tokens that each query token may attend to."""
    return (batch.positions + 1).tolist()


def naive_choice(queries: IndexQueries, cache: Tensor, batch: Batch, top_k: int) -> list[list[int]]:
    """Positions of each query token's choice, one token and one position after another."""
    rows = [row for row, n in enumerate(batch.query_lens) for _ in range(n)]
    choices = []
    for token, (row, length) in enumerate(zip(rows, lengths_of(batch), strict=True)):
        scores = []
        for p in range(length):
            key = cache[batch.page_table[row, p // PAGE], 0, p % PAGE, 0].double()
            products = (queries.q[token].double() @ key).relu()
            scores.append(float(products @ queries.weights[token].double()))
        order = sorted(range(length), key=lambda p: (-scores[p], p))
        choices.append(sorted(order[:top_k]))
    return choices


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("heads", "dim", "top_k"), SHAPES)
@pytest.mark.parametrize("mix", MIXES)
def test_the_reference_chooses_the_best(
    mix: str, heads: int, dim: int, top_k: int, equal: bool
) -> None:
    batch, cache = make_step(mix, dim)
    plan = plan_for(batch, cache, top_k)
    keys = whole_numbers(*cache.shape) if equal else torch.randn(cache.shape)
    cache = torch.where(cache.isnan(), cache, keys)
    cache.flatten(0, 3)[plan.cache_index] = keys.flatten(0, 3)[plan.cache_index]
    queries = make_queries(len(batch.tokens), heads, dim, equal)
    chosen = reference.choose_tokens(queries, cache, plan)
    assert chosen is not None and chosen.dtype == torch.int32
    assert chosen.shape == (len(batch.tokens), top_k)
    expected = naive_choice(queries, cache, batch, top_k)
    found = [one[: len(other)] for one, other in zip(chosen.tolist(), expected, strict=True)]
    assert found == expected


def test_nothing_to_choose() -> None:
    """As many tokens as the indexer may choose, or fewer."""
    batch, cache = make_step("chunks", 8)
    assert plan_for(batch, cache, 40).top_k is None
    assert plan_for(batch, cache, 39).top_k == 39
    queries = make_queries(len(batch.tokens), 4, 8, equal=False)
    assert reference.choose_tokens(queries, cache, plan_for(batch, cache, 40)) is None


@pytest.mark.parametrize("tokens", [None, [0, 3, 4]])
@pytest.mark.parametrize("mix", MIXES)
def test_only_chosen_latents_are_attended_to(mix: str, tokens: list[int] | None) -> None:
    """Other latents may be anything finite. With `tokens`, the plan covers some decode rows."""
    rank, rope_dim, top_k = 32, 8, 12
    batch, cache = make_step(mix, rank + rope_dim)
    cache = torch.where(cache.isnan(), cache, torch.randn(cache.shape))
    every = reference.plan_attention(batch, cache, None)
    cache.flatten(0, 3)[every.cache_index] = torch.randn(len(every.cache_index), rank + rope_dim)
    q = torch.randn(len(batch.tokens), 3, rank + rope_dim)
    index = None
    if tokens is not None:
        if mix != "decode":
            pytest.skip("these tokens are decode rows")
        index = torch.tensor(tokens)
        batch = replace(
            batch,
            slots=batch.slots[index],
            positions=batch.positions[index],
            context_lens=batch.context_lens[index],
            context_lens_cpu=batch.context_lens_cpu[tokens],
            query_lens=[1] * len(tokens),
            num_decode=len(tokens),
        )
    plan = plan_for(batch, cache, top_k)
    lens = torch.tensor(lengths_of(batch))
    chosen = torch.stack([torch.randperm(int(n))[:top_k].sort().values if n > top_k
                          else torch.arange(top_k) for n in lens]).int()  # fmt: skip
    out = reference.attend_latent(q, plain_up(3, rank), cache, plan, index, chosen)
    out = out.unflatten(1, (3, rank))
    slots = batch.slots.repeat_interleave(torch.tensor(batch.query_lens))
    q = q if index is None else q[index]
    for token, (slot, n) in enumerate(zip(slots, lens, strict=True)):
        at = chosen[token, : min(int(n), top_k)].long()
        latents = cache[batch.page_table[slot, at // PAGE], 0, at % PAGE, 0]
        weights = (0.2 * q[token] @ latents.T).softmax(-1)
        torch.testing.assert_close(out[token], weights @ latents[:, :rank], rtol=0, atol=2e-6)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "dim", "rope_dim", "interleaved"), [(16, 32, 16, True),
                         (5, 24, 24, False), (20, 40, 12, True)])  # fmt: skip
@pytest.mark.parametrize("device", DEVICES)
def test_the_store_kernel_is_its_twin(
    device: str,
    heads: int,
    dim: int,
    rope_dim: int,
    interleaved: bool,
    cache_dtype: torch.dtype,
) -> None:
    from gllm_engine.ops import triton

    half = cache_dtype == torch.bfloat16
    if device == "cpu" and half:
        pytest.skip("numpy, which interprets kernels, has no bfloat16")
    dtype = torch.bfloat16 if half else torch.float32
    batch, wide = make_step("both", dim)
    cache = torch.zeros(wide.shape).to(cache_dtype)
    tokens = len(batch.tokens)
    q = torch.randn(tokens, heads, dim).to(dtype)
    k = (3 * torch.randn(tokens, dim) + 1).to(dtype)
    gain, bias = torch.randn(2, dim).to(dtype)
    gain[0] = 1000.0  # beyond float8
    cos, sin = torch.rand(2, 3000, rope_dim // 2)

    twin = torch.zeros(wide.shape).to(torch.float32 if half else cache_dtype)
    plan = reference.plan_attention(batch, twin, None, torch.float32)
    rotary = reference.rotary_inputs(cos, sin, batch.positions, torch.float32, interleaved)
    norm = (gain.float(), bias.float(), 1e-6)
    expected = reference.store_index_key(q.float(), k.float(), norm, rotary, twin, plan)
    there = cache.to(device)
    moved = to_device(batch, device)
    found = triton.store_index_key(
        q.to(device),
        k.to(device),
        (gain.to(device), bias.to(device), 1e-6),
        RotaryInputs(cos.to(device), sin.to(device), interleaved, moved.positions),
        there,
        PagedPlan(moved.cache_index),
    )
    limit = 2e-2 if half else 1e-5
    near(found, expected, limit)
    if cache_dtype == torch.float8_e4m3fn:
        assert there.float().abs().max() == 448
        wrong = (there.float().cpu() - twin.float()).abs() > 0.13 * twin.float().abs() + 0.01
        # The interpreter halves what it should round up to a power of two.
        assert wrong.sum() <= (0 if device == "cuda" else 0.05 * tokens * dim)
    else:
        near(there, twin, limit)


# `memory`: numbers for the scores of all rows, or of a few. `block`: scores in one iteration.
@pytest.mark.parametrize(
    ("mix", "memory", "block"),
    [("decode", 1 << 16, 64), ("chunks", 1 << 16, 4096), ("both", 1500, 4096)],
)
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("heads", "dim", "top_k"), SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_choose_as_their_twin(
    device: str,
    mix: str,
    heads: int,
    dim: int,
    top_k: int,
    equal: bool,
    memory: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the choice to the attention over it."""
    from gllm_engine.ops import triton
    from gllm_engine.ops.triton import indexer

    monkeypatch.setattr(indexer, "_SCORES", block)
    torch.manual_seed(0)
    rank, rope_dim = 32, 16
    batch, cache = make_step(mix, dim)
    plan = plan_for(batch, cache, top_k)
    cache = (whole_numbers(*cache.shape) if equal else torch.randn(cache.shape)).contiguous()
    latents = torch.randn(*cache.shape[:4], rank + rope_dim)
    queries = make_queries(len(batch.tokens), heads, dim, equal)
    expected = reference.choose_tokens(queries, cache, plan)
    assert expected is not None

    moved = to_device(batch, device)
    slots = moved.slots.repeat_interleave(torch.tensor(batch.query_lens, device=device))
    lens = moved.positions + 1
    longest = int(batch.context_lens_cpu.max())
    scores = torch.full((memory,), float("nan"), device=device)
    choice = triton.plan_choice(moved.page_table, slots, lens, longest, top_k, scores)
    assert (len(choice.scans) > 1) == (memory == 1500)
    there = IndexQueries(*(part.to(device) for part in queries))
    chosen = triton.choose_tokens(there, cache.to(device), choice)
    counts = lens.clamp(max=top_k)
    for found, twin, count in zip(chosen.cpu(), expected, counts.tolist(), strict=True):
        assert found[:count].tolist() == twin[:count].tolist()

    q = torch.randn(len(slots), 6, rank + rope_dim)
    kv_up = plain_up(6, rank)
    out = torch.empty(len(slots), 6, rank, device=device)
    splits = triton.split_latents(moved.page_table, slots, counts, 6)
    triton.attend_latent(
        q.to(device), kv_up.to(device), latents.to(device), splits, 0.2, out, chosen
    )
    twin = reference.attend_latent(q, kv_up, latents, plan, None, expected)
    near(out.flatten(1), twin, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_of_all_kinds_have_an_order(device: str) -> None:
    """Of both signs, of every size, zeros of both signs."""
    from gllm_engine.ops import triton

    some = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38, -3e38, 2.5, -2.5, 0.5, 7.0]
    scores = torch.tensor(some + some[::-1])[None, :, None]
    batch, cache = make_step("decode", 16)
    batch = replace(batch, slots=batch.slots[3:4], context_lens=torch.tensor([24]), query_lens=[1])
    at = torch.arange(24)
    cache.zero_()[batch.page_table[3, at // PAGE], 0, at % PAGE, 0, 0] = scores[0, :, 0].abs()
    # One head adds what is positive, the other one takes it away from negative scores.
    cache[batch.page_table[3, at // PAGE], 0, at % PAGE, 0, 1] = scores[0, :, 0].lt(0).float()
    q = torch.zeros(1, 2, 16)
    q[0, 0, 0] = 1.0
    q[0, 1, 1] = 1.0
    queries = IndexQueries(q, torch.tensor([[1.0, -1e38]]))
    for top_k in (1, 4, 7, 12, 13, 18, 23):
        planner = reference.make_planner(torch.device("cpu"), torch.float32)
        one = replace(batch, context_lens_cpu=torch.tensor([24]).numpy(), num_decode=1)
        expected = reference.choose_tokens(
            queries, cache, planner.plan_latent(one, cache, LatentShape(1, 1, 1, 1.0, 1, top_k))
        )
        moved = to_device(batch, device)
        choice = triton.plan_choice(
            moved.page_table,
            moved.slots,
            moved.context_lens,
            24,
            top_k,
            torch.empty(512, device=device),
        )
        there = IndexQueries(*(part.to(device) for part in queries))
        chosen = triton.choose_tokens(there, cache.to(device), choice)
        assert expected is not None
        assert chosen.cpu().tolist() == expected.tolist()
