"""Kernels of latent attention against their slow twins, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from test_reference import make_case
from torch import Tensor

from gllm_engine.ops import Batch, LatentQueries, reference

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
# (context after the step, tokens in the step) of each row; decode rows come first.
MIXES = {
    "decode": [(1, 1), (17, 1), (33, 1), (700, 1)],
    "chunks": [(5, 5), (21, 4), (40, 17)],
    "both": [(300, 1), (16, 1), (19, 19), (33, 6)],
}
# heads, nope_dim, rope_dim, rank
SHAPES = [(16, 32, 16, 64), (20, 16, 32, 128), (5, 24, 16, 32)]


def to_device(batch: Batch, device: str) -> Batch:
    moved = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_are_their_twins(
    device: str, mix: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    from gllm_engine.ops import triton

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("numpy, which interprets kernels, has no bfloat16")
    heads, nope_dim, rope_dim, rank = shape
    page_size = 16
    rows = MIXES[mix]
    batch, _, _ = make_case(rows, page_size, 1, 7, rank)
    num_decode = next((i for i, (_, n) in enumerate(rows) if n > 1), len(rows))
    batch = replace(batch, num_decode=num_decode)
    num_tokens = len(batch.tokens)
    num_pages = int(batch.page_table.max()) + 1
    cache = torch.randn(num_pages, 1, page_size, 1, rank + rope_dim).to(dtype)
    q = torch.randn(num_tokens, heads, nope_dim + rope_dim).to(dtype)
    latent = torch.randn(num_tokens, 3 + rank + rope_dim).to(dtype)[:, 3:]
    gain = torch.rand(rank).to(dtype) + 0.5
    w_uk = (torch.randn(heads, nope_dim + 8, rank) / nope_dim**0.5).to(dtype)[:, :nope_dim]
    cos, sin = torch.rand(2, 3000, rope_dim // 2)
    interleaved = heads != 20

    wide = cache.float()
    plan = reference.plan_attention(batch, wide, None)
    rotary = reference.rotary_inputs(cos, sin, batch.positions, torch.float32, interleaved)
    norm = (gain.float(), 1e-6)
    expected = reference.store_latent(
        q.float(), latent.float(), norm, w_uk.float(), rotary, interleaved, wide, plan
    )

    there = cache.to(device)
    moved = to_device(batch, device)
    found = triton.store_latent(
        q.to(device),
        latent.to(device),
        (gain.to(device), 1e-6),
        w_uk.to(device),
        (cos.to(device), sin.to(device)),
        moved.positions,
        interleaved,
        there,
        moved.cache_index,
    )
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    near(there, wide, limit)
    near(found.latent, expected.latent, limit)
    near(found.rope, expected.rope, limit)

    lens = torch.tensor(batch.query_lens, device=device)
    slots = moved.slots.repeat_interleave(lens)
    blocks = triton.head_blocks(heads)
    splits = triton.split_kv(moved.page_table, slots, moved.positions + 1, blocks, None)
    scale = (nope_dim + rope_dim) ** -0.5
    out = triton.attend_latent(found, there, splits, scale)
    queries = LatentQueries(found.latent.float().cpu(), found.rope.float().cpu())
    twin = reference.attend_latent(queries, there.float().cpu(), plan, scale)
    near(out, twin, limit)
    assert not splits.arrived.any()


def near(found: Tensor, expected: Tensor, limit: float) -> None:
    torch.testing.assert_close(found.float().cpu(), expected, rtol=limit, atol=limit)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")
@pytest.mark.parametrize(("heads", "blocks"), [(16, 1), (20, 1), (64, 1), (128, 2), (96, 2)])
def test_heads_are_divided_evenly(heads: int, blocks: int) -> None:
    from gllm_engine.ops import triton

    assert triton.head_blocks(heads) == blocks
