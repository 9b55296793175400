"""The reference operations against naive ones, on caches whose unused pages hold NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from naive_attention import attention
from torch import Tensor

from gllm_engine import ops
from gllm_engine.ops import AttentionInputs, Batch, reference, select_ops

HEAD_DIM = 8


def make_case(
    rows: list[tuple[int, int]],
    page_size: int,
    kv_heads: int,
    seed: int = 0,
    head_dim: int = HEAD_DIM,
) -> tuple[Batch, Tensor, Tensor]:
    """(batch, kv of its tokens, cache) for rows of (context, tokens in this step).

    Pages are shuffled. The cache holds what earlier steps wrote, and NaN everywhere else.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // page_size) for context, _ in rows]
    order = torch.randperm(sum(counts) + 3, generator=generator)  # 3 pages stay unused
    shape = (len(order), 2, page_size, kv_heads, head_dim)
    cache = torch.full(shape, float("nan"))
    # Padding points at a page that is nobody's: NaN.
    table = torch.full((len(rows), max(counts) + 2), int(order[-1]))
    positions, index, first = [], [], 0
    for row, ((context, num), count) in enumerate(zip(rows, counts, strict=True)):
        table[row, :count] = order[first : first + count]
        first += count
        for p in range(context - num):
            slot = cache[table[row, p // page_size], :, p % page_size]
            slot.copy_(torch.randn(slot.shape, generator=generator))
        p = torch.arange(context - num, context)
        positions.append(p)
        index.append(table[row, p // page_size] * page_size + p % page_size)
    lens = [num for _, num in rows]
    batch = Batch(
        tokens=torch.zeros(sum(lens), dtype=torch.long),
        positions=torch.cat(positions),
        cache_index=torch.cat(index),
        page_table=table,
        slots=torch.arange(len(rows)),
        context_lens=torch.tensor([context for context, _ in rows]),
        context_lens_cpu=np.array([context for context, _ in rows]),
        query_lens=lens,
        num_decode=next((i for i, n in enumerate(lens) if n > 1), len(lens)),
        logit_index=torch.arange(sum(lens)),
    )
    kv = torch.randn((sum(lens), 2, kv_heads, head_dim), generator=generator)
    return batch, kv, cache


DECODE = [(1, 1), (17, 1), (16, 1), (9, 1), (33, 1)]
CHUNKS = [(5, 5), (16, 16), (21, 4), (40, 17)]
MIXES = {"decode": DECODE, "chunks": CHUNKS, "both": DECODE + CHUNKS, "one": [(1, 1)]}


@pytest.mark.parametrize("window", [None, 1, 4, 15])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("mix", MIXES)
def test_paged_attention(
    mix: str, page_size: int, heads: int, kv_heads: int, window: int | None
) -> None:
    batch, kv, cache = make_case(MIXES[mix], page_size, kv_heads)
    q = torch.randn(
        (len(batch.tokens), heads, HEAD_DIM), generator=torch.Generator().manual_seed(9)
    )
    plan = reference.plan_attention(batch, cache, window)
    reference.write_kv(cache, kv, plan)
    out = reference.attend(AttentionInputs(q), cache, plan)
    expected = attention(q, cache, batch, window)
    assert expected.isfinite().all()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [1, 4, 15])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("mix", MIXES)
def test_attention_in_chunks_of_the_sequence(
    mix: str, heads: int, kv_heads: int, window: int
) -> None:
    batch, kv, cache = make_case(MIXES[mix], 4, kv_heads)
    q = torch.randn((len(batch.tokens), heads, HEAD_DIM))
    plan = reference.plan_attention(batch, cache, window, chunked=True)
    reference.write_kv(cache, kv, plan)
    out = reference.attend(AttentionInputs(q), cache, plan)
    expected = attention(q, cache, batch, window, chunked=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("mix", MIXES)
def test_attention_with_sinks(mix: str, heads: int, kv_heads: int, window: int | None) -> None:
    batch, kv, cache = make_case(MIXES[mix], 4, kv_heads)
    q = torch.randn((len(batch.tokens), heads, HEAD_DIM))
    sinks = torch.tensor([2.0, -1.0, 500.0, 0.5])[:heads]  # head 2 sees nothing but its sink
    plan = reference.plan_attention(batch, cache, window)
    reference.write_kv(cache, kv, plan)
    out = reference.attend(AttentionInputs(q), cache, plan, sinks=sinks)
    expected = attention(q, cache, batch, window, sinks=sinks)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_write_touches_only_its_places() -> None:
    batch, kv, cache = make_case([(9, 1), (7, 3)], page_size=4, kv_heads=2)
    before = cache.clone()
    reference.write_kv(cache, kv, reference.plan_attention(batch, cache, None))
    page, offset = batch.cache_index // 4, batch.cache_index % 4
    torch.testing.assert_close(cache[page, :, offset], kv)
    before[page, :, offset] = kv
    torch.testing.assert_close(cache, before, equal_nan=True)


def test_rows_of_very_different_length_attend_apart() -> None:
    """A long row must not make the short ones pay for its padding."""
    rows = [(3, 1), (200, 1), (2, 1), (150, 1), (4, 1)]
    batch, kv, cache = make_case(rows, page_size=4, kv_heads=2)
    plan = reference.plan_attention(batch, cache, None)
    assert sum(part.mask.numel() for part in plan.padded) <= 2 * sum(n for n, _ in rows)
    reference.write_kv(cache, kv, plan)
    q = torch.randn(5, 4, HEAD_DIM)
    out = reference.attend(AttentionInputs(q), cache, plan)
    expected = attention(q, cache, batch, None)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_many_rows_attend_in_parts() -> None:
    """What is gathered at once is bounded, however many rows there are."""
    rows = [(n, 1) for n in range(100, 200)]
    batch, kv, cache = make_case(rows, page_size=16, kv_heads=16)
    plan = reference.plan_attention(batch, cache, None)
    limit = reference._GATHER_NUMBERS
    assert len(plan.padded) > 1
    assert all(part.gather.numel() * 16 * HEAD_DIM <= limit for part in plan.padded)
    assert sorted(int(r) for part in plan.padded for r in part.rows) == list(range(100))
    reference.write_kv(cache, kv, plan)
    q = torch.randn(100, 16, HEAD_DIM)
    rows_alone = []
    for row in (0, 57, 99):
        alone = Batch(
            *(batch.tokens[:1], batch.positions[:1], batch.cache_index[row : row + 1]),
            *(batch.page_table, batch.slots[row : row + 1], batch.context_lens[row : row + 1]),
            context_lens_cpu=batch.context_lens_cpu[row : row + 1],
            query_lens=[1],
            num_decode=1,
            logit_index=None,
        )
        own = reference.plan_attention(alone, cache, None)
        rows_alone.append(reference.attend(AttentionInputs(q[row : row + 1]), cache, own)[0])
    together = reference.attend(AttentionInputs(q), cache, plan)[[0, 57, 99]]
    torch.testing.assert_close(together, torch.stack(rows_alone), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(*s, dtype=dtype) for s in ((5, 12), (5, 12), (12,)))
    total = (x + residual).double()
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * weight.double()
    close = 4 * torch.finfo(dtype).eps
    normed = reference.rms_norm(x + residual, weight, 0.1)
    torch.testing.assert_close(normed.double(), expected, rtol=close, atol=close)
    stream = residual.clone()
    assert reference.rms_norm(x + residual, weight, 0.1, add_to=stream) is stream
    torch.testing.assert_close(stream, residual + normed)


def test_linear_and_what_rides_along() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(10, 8), torch.randn(10)
    norm, total = (torch.rand(8), 0.1), torch.randn(3, 10)
    normed = reference.rms_norm(x, *norm)
    y = normed @ weight.T + bias
    torch.testing.assert_close(reference.linear(x, weight, bias, norm), y)
    out = torch.full((3, 10), torch.nan)
    assert reference.linear(x, weight, bias, norm, out) is out
    torch.testing.assert_close(out, y)
    gated = y[:, :5] * y[:, :5].sigmoid() * y[:, 5:]
    torch.testing.assert_close(reference.gated_linear(x, weight, bias, norm), gated)
    expected = total + x @ weight.T
    assert reference.add_linear(total, x, weight, None) is total
    torch.testing.assert_close(total, expected)


def test_gated_silu() -> None:
    x = torch.randn(4, 10)
    gate, up = x[:, :5], x[:, 5:]
    found = reference.activate(x, "silu", gated=True)
    torch.testing.assert_close(found, gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4, 2])
def test_rotate(interleaved: bool, dim: int) -> None:
    x, angles = torch.randn(6, 3, 8), torch.randn(6, dim // 2)
    expected = x.clone()
    for pair in range(dim // 2):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dim // 2)
        c, s = angles[:, pair, None].cos(), angles[:, pair, None].sin()
        expected[..., a] = x[..., a] * c - x[..., b] * s
        expected[..., b] = x[..., b] * c + x[..., a] * s
    reference.rotate(x, reference.expand_rotation(angles.cos(), angles.sin(), interleaved))
    torch.testing.assert_close(x, expected)


def test_select_ops() -> None:
    assert select_ops(torch.device("cpu")) is reference
    with pytest.raises(ValueError, match="device mps has no operations; supported: cpu"):
        select_ops(torch.device("mps"))


def test_a_device_without_operations_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert ops.best_device().type == "cpu"
