"""Kernels of latent attention against their slow twins, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import DEVICES, INTERPRETED
from test_reference import make_case
from torch import Tensor

from gllm_engine.attention_shape import LatentShape
from gllm_engine.ops import Batch, PagedPlan, RotaryInputs, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
# (context after the step, tokens in the step) of each row; decode rows come first.
MIXES = {
    "decode": [(1, 1), (17, 1), (33, 1), (700, 1)],
    # 41 parts of a row and the first parts of the next ones in one block.
    "long": [(2600, 1), (64, 1), (65, 1)],
    "chunks": [(5, 5), (21, 4), (40, 17)],
    "both": [(300, 1), (16, 1), (19, 19), (33, 6)],
}
# heads, nope_dim, rope_dim, rank, value_dim. Tiles of the cache are copied in one way for up to 16
# heads, and in another one for more; 40 heads are two blocks.
SHAPES = [(16, 32, 16, 64, 24), (20, 16, 32, 128, 32), (5, 24, 16, 32, 8), (40, 16, 16, 32, 48)]
PAGE_SIZES = {16: 16, 20: 1, 5: 64, 40: 24}


def to_device(batch: Batch, device: str) -> Batch:
    moved = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **moved)


def plain_up(heads: int, rank: int) -> Tensor:
    """W_UK and W_UV that make the latents themselves the keys and the values."""
    return torch.eye(rank).repeat(heads, 2, 1)


def mixed_step(rows: list[tuple[int, int]], page_size: int) -> Batch:
    """A step of rows of (context after the step, tokens in the step), decode rows first."""
    batch, _, _ = make_case(rows, page_size, 1, 7, 8)
    num_decode = next((i for i, (_, n) in enumerate(rows) if n > 1), len(rows))
    return replace(batch, num_decode=num_decode)


def plan_reference(batch: Batch, cache: Tensor, scale: float) -> reference.ReferencePlan:
    planner = reference.make_planner(torch.device("cpu"), torch.float32)
    return planner.plan_latent(batch, cache, LatentShape(1, 1, 1, scale, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_are_their_twins(
    device: str, mix: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    from gllm_engine.ops import triton

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("numpy, which interprets kernels, has no bfloat16")
    heads, nope_dim, rope_dim, rank, value_dim = shape
    page_size = PAGE_SIZES[heads]
    batch = mixed_step(MIXES[mix], page_size)
    num_tokens = len(batch.tokens)
    num_pages = int(batch.page_table.max()) + 1
    cache = torch.randn(num_pages, 1, page_size, 1, rank + rope_dim).to(dtype)
    # Of each token, q lies beside other numbers.
    q = torch.randn(num_tokens, heads * (nope_dim + rope_dim) + 8).to(dtype)
    latent = torch.randn(num_tokens, 3 + rank + rope_dim).to(dtype)[:, 3:]
    gain = torch.rand(rank).to(dtype) + 0.5
    kv_up = (torch.randn(heads, nope_dim + value_dim, rank) / rank**0.5).to(dtype)
    cos, sin = torch.rand(2, 3000, rope_dim // 2)
    interleaved = heads != 20

    def heads_of(whole: Tensor) -> Tensor:
        return whole[:, :-8].unflatten(1, (heads, -1))

    wide = cache.float()
    scale = (nope_dim + rope_dim) ** -0.5
    plan = plan_reference(batch, wide, scale)
    rotary = reference.rotary_inputs(cos, sin, batch.positions, torch.float32, interleaved)
    norm = (gain.float(), 1e-6)
    expected = q.float().clone()
    reference.store_latent(heads_of(expected), latent.float(), norm, rotary, wide, plan)

    there = cache.to(device)
    found = q.clone().to(device)
    moved = to_device(batch, device)
    triton.store_latent(
        heads_of(found),
        latent.to(device),
        (gain.to(device), 1e-6),
        RotaryInputs(cos.to(device), sin.to(device), interleaved, moved.positions),
        there,
        PagedPlan(moved.cache_index),
    )
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    near(there, wide, limit)
    near(found, expected, limit)
    assert not torch.equal(expected, q.float())

    lens = torch.tensor(batch.query_lens, device=device)
    slots = moved.slots.repeat_interleave(lens)
    splits = triton.split_latents(moved.page_table, slots, moved.positions + 1, heads)
    out = found.new_empty(num_tokens, heads, value_dim)
    triton.attend_latent(heads_of(found), kv_up.to(device), there, splits, scale, out)
    twin = reference.attend_latent(
        heads_of(found.float().cpu()), kv_up.float(), there.float().cpu(), plan
    )
    near(out.flatten(1), twin, limit)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_latents_are_gathered(
    device: str, shape: tuple[int, int, int, int, int], cache_dtype: torch.dtype
) -> None:
    """And the rotated keys are there for all heads; nothing else is written."""
    from gllm_engine.ops import triton

    heads, nope_dim, rope_dim, rank, _ = shape
    cache = torch.randn(5, 1, 16, 1, rank + rope_dim).to(cache_dtype).to(device)
    at = torch.randint(5 * 16, (37,))
    latents = torch.full((37, rank), float("nan"), device=device)
    k = torch.full((37, heads, nope_dim + rope_dim), float("nan"), device=device)
    triton.gather_latents(cache, at.to(device), latents, k)
    expected = cache.cpu().float().flatten(0, 3)[at]
    near(latents, expected[:, :rank], 0)
    near(k[..., nope_dim:], expected[:, None, rank:].expand(-1, heads, -1), 0)
    assert k[..., :nope_dim].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_that_is_not_finite_leaves_the_others_alone(device: str, broken: float) -> None:
    """Rows whose parts are multiplied together, one of which attends to a broken latent."""
    from gllm_engine.ops import triton

    batch = mixed_step([(200, 1), (70, 1), (33, 1)], 16)
    cache = torch.randn(int(batch.page_table.max()) + 1, 1, 16, 1, 64 + 16)
    q, kv_up = torch.randn(3, 8, 32 + 16), torch.randn(8, 32 + 24, 64) / 8
    there = cache.clone()
    there[batch.page_table[batch.slots[1], 2], 0, 3, 0, 5] = broken
    moved = to_device(batch, device)
    splits = triton.split_latents(moved.page_table, moved.slots, moved.context_lens, 8)
    out = torch.empty(3, 8, 24, device=device)
    inputs = (tensor.to(device) for tensor in (q, kv_up, there))
    triton.attend_latent(*inputs, splits, 0.1, out)
    twin = reference.attend_latent(q, kv_up, cache, plan_reference(batch, cache, 0.1))
    near(out[[0, 2]].flatten(1), twin[[0, 2]], 1e-5)
    assert not out[1].isfinite().any()


# Of rows and contexts: fewer rows than multiprocessors, with many parts, or as many rows.
DECODE = {"few": [(5000, 1), (1, 1), (700, 1)], "many": [(130 + 37 * i, 1) for i in range(70)]}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", DECODE)
@pytest.mark.parametrize("heads", [8, 16, 20, 64, 128])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_decode_rows_of_true_sizes_on_a_gpu(
    heads: int, cache_dtype: torch.dtype, rows: str
) -> None:
    """Of all numbers of heads that a rank may have; what no row attends to is NaN."""
    from gllm_engine.ops import triton

    torch.manual_seed(0)
    batch = mixed_step(DECODE[rows], 16)
    cache = torch.randn(int(batch.page_table.max()) + 1, 1, 16, 1, 576).to(cache_dtype)
    q = torch.randn(len(batch.tokens), heads, 192).bfloat16()
    kv_up = torch.randn(heads, 256, 512).bfloat16() / 512**0.5
    wide = cache.float()
    there = cache.to("cuda")
    unused = torch.ones(len(cache), 16, dtype=torch.bool)
    for slot, length in zip(batch.slots, batch.context_lens, strict=True):
        at = torch.arange(length)
        unused[batch.page_table[slot, at // 16], at % 16] = False
    there[:, 0, :, 0].view(torch.uint8)[unused.to("cuda")] = 0xFF  # NaN in both dtypes
    moved = to_device(batch, "cuda")
    splits = triton.split_latents(moved.page_table, moved.slots, moved.context_lens, heads)
    out = torch.empty(len(batch.tokens), heads, 128, dtype=torch.bfloat16, device="cuda")
    triton.attend_latent(q.to("cuda"), kv_up.to("cuda"), there, splits, 0.07, out)
    plan = plan_reference(batch, wide, 0.07)
    near(out.flatten(1), reference.attend_latent(q.float(), kv_up.float(), wide, plan), 3e-2)
    again = torch.empty_like(out)
    triton.attend_latent(q.to("cuda"), kv_up.to("cuda"), there, splits, 0.07, again)
    assert torch.equal(again, out)


# Heads, channels of a key and of a value, of DeepSeek-V2-Lite and GLM-4.7-Flash.
@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(16, 192, 128), (20, 256, 256)])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_step_of_all_kinds_of_rows_on_a_gpu(
    heads: int,
    key_dim: int,
    value_dim: int,
    cache_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All heads at once, and a few; in the absorbed form only, and by the twin."""
    from gllm_engine.ops import flashinfer, latent_rows

    torch.manual_seed(0)
    device = torch.device("cuda")
    rank, rope_dim = 512, 64
    batch = mixed_step([(300, 1), (16, 1), (700, 130), (1000, 200), (190, 190), (67, 67)], 16)
    num_pages = int(batch.page_table.max()) + 1
    cache = torch.randn(num_pages, 1, 16, 1, rank + rope_dim).to(cache_dtype)
    q = torch.randn(len(batch.tokens), heads, key_dim).bfloat16()
    kv_up = torch.randn(heads, key_dim - rope_dim + value_dim, rank).bfloat16() / rank**0.5
    scale = key_dim**-0.5
    moved = to_device(batch, "cuda")

    def attend() -> tuple[Tensor, flashinfer.LatentPlan]:
        planner = flashinfer.make_planner(device, torch.bfloat16)
        there = cache.to(device)
        plan = planner.plan_latent(moved, there, LatentShape(heads, key_dim, value_dim, scale, 576))
        return flashinfer.attend_latent(q.to(device), kv_up.to(device), there, plan), plan

    wide = cache.float()
    twin = reference.attend_latent(
        q.float(), kv_up.float(), wide, plan_reference(batch, wide, scale)
    )
    out, plan = attend()
    assert plan.num_absorbed == 2 and plan.expanded is not None
    assert plan.expanded.at_once == heads
    near(out, twin, 3e-2)
    monkeypatch.setattr(latent_rows, "EXPANDED_BYTES", 2 * 1957 * (576 + 5 * (key_dim + value_dim)))
    some, plan = attend()
    assert plan.expanded is not None and plan.expanded.at_once < heads
    near(some, out.float().cpu(), 2e-2)
    monkeypatch.setattr(latent_rows, "EXPANDED_BYTES", 0)
    absorbed, plan = attend()
    assert plan.expanded is None and plan.num_absorbed == len(batch.tokens)
    near(absorbed, twin, 3e-2)


def near(found: Tensor, expected: Tensor, limit: float) -> None:
    torch.testing.assert_close(found.float().cpu(), expected, rtol=limit, atol=limit)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")
@pytest.mark.parametrize(("heads", "blocks"), [(16, 1), (20, 1), (64, 2), (128, 4), (40, 2)])
def test_heads_are_divided_evenly(heads: int, blocks: int) -> None:
    from gllm_engine.ops import triton

    assert triton.head_blocks(heads) == blocks
