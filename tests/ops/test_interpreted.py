"""The Triton kernels against their slow twins without a GPU, in Triton's interpreter.

Small shapes: the interpreter is slow. Outputs begin as NaN. On a GPU, test_gpu_kernels.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import naive_routing
import numpy as np
import pytest
import torch
from test_reference import make_case
from torch import Tensor

from gllm_engine.ops import (
    AttentionInputs,
    HeadNorm,
    PackedWeight,
    PagedPlan,
    RotaryInputs,
    RoundedRows,
    reference,
)
from gllm_engine.routing import Clamp, Routing

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)
from gllm_engine.ops import triton  # noqa: E402
from gllm_engine.ops.triton import moe  # noqa: E402
from gllm_engine.ops.triton.skinny import Tiling, choose_tiling  # noqa: E402

Route = Callable[[Tensor, Routing, Tensor | None], tuple[Tensor, Tensor]]

pytestmark = [
    # The interpreter's own, in a loop whose length a kernel has loaded.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    # Heads that only fill a group up; nothing of theirs is stored.
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty gives is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def near(out: Tensor, expected: Tensor, limit: float) -> None:
    out, expected = out.double(), expected.double()
    assert out.shape == expected.shape and out.isfinite().all()
    assert (out - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (5, 96)])
def test_norm_and_activation(rows: int, dim: int) -> None:
    x, total, gain = torch.randn(rows, dim), torch.randn(rows, dim), torch.rand(dim)
    expected = reference.rms_norm(x, gain, 1e-5)
    near(triton.rms_norm(x, gain, 1e-5), expected, 1e-6)
    near(triton.rms_norm(x, gain, 1e-5, add_to=total.clone()), total + expected, 1e-6)
    wide = torch.randn(rows, 2 * dim)
    expected = reference.activate(wide, "silu", gated=True)
    near(triton.activate(wide, "silu", gated=True), expected, 1e-6)
    assert triton.rms_norm(x[:0], gain, 1e-5).shape == (0, dim)


@pytest.mark.parametrize("dim", [64, 96])
def test_norms_of_other_kinds(dim: int) -> None:
    """Far from zero, so that a mean that counts the columns beyond `dim` would show."""
    x, total = torch.randn(5, dim) + 3, torch.randn(5, dim)
    gain, bias = torch.rand(dim), torch.randn(dim)
    expected = reference.rms_norm(x, gain, 1e-5, plus_one=True)
    near(expected, reference.rms_norm(x, 1 + gain, 1e-5), 1e-6)
    near(triton.rms_norm(x, gain, 1e-5, plus_one=True), expected, 1e-6)
    near(triton.rms_norm(x, gain, 1e-5, total.clone(), plus_one=True), total + expected, 1e-6)
    for b in (None, bias):
        expected = torch.nn.functional.layer_norm(x, (dim,), gain, b, 1e-5)
        near(reference.layer_norm(x, gain, b, 1e-5), expected, 1e-6)
        near(triton.layer_norm(x, gain, b, 1e-5), expected, 1e-5)
    assert triton.layer_norm(x[:0], gain, bias, 1e-5).shape == (0, dim)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_that_adds_to_its_input(kind: str) -> None:
    """Afterwards: what it normalises is without it."""
    x, gain, later = torch.randn(5, 96), torch.rand(96), torch.randn(96)
    args: tuple[Tensor | float, ...] = (gain, 1e-5) if kind == "rms" else (gain, gain, 1e-5)
    expected = getattr(reference, f"{kind}_norm")(x, *args)
    for ops in (reference, triton):
        total = x.clone()
        near(getattr(ops, f"{kind}_norm")(total, *args, add_after=later), expected, 1e-6)
        assert torch.equal(total, x + later)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "gelu_quick"])
def test_activations(act: str, gated: bool) -> None:
    x = 3 * torch.randn(3, 40)
    x[0, :4] = torch.tensor([-60.0, 60.0, -300.0, 300.0])
    near(triton.activate(x, act, gated), reference.activate(x, act, gated), 1e-6)


def test_mean_squares_of_wide_heads() -> None:
    """More numbers than one block of the kernel has."""
    qkv = torch.randn(2, 20, 128)
    near(triton.mean_squares(qkv, 16), reference.mean_squares(qkv, 16), 1e-6)
    assert triton.mean_squares(qkv[:0], 16).shape == (0, 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("depth", "width"), [(64, 24), (160, 10), (2048, 12), (2501, 14), (9000, 6)]
)
def test_gemv_and_what_rides_along(depth: int, width: int, bias: bool) -> None:
    x, gain = torch.randn(1, depth).to(BF16), torch.rand(depth).to(BF16)
    weight = (torch.randn(width, depth) / depth**0.5).to(BF16)
    b = torch.randn(width).to(BF16) if bias else None
    wide = [None if t is None else t.double() for t in (x, weight, b, gain)]
    x64, weight64, b64, gain64 = wide
    norm, norm64 = (gain, 1e-5), (gain64, 1e-5)
    near(triton.gemv(x, weight, b), reference.linear(x64, weight64, b64), 1e-2)
    # The interpreter cuts numbers to bfloat16 where a GPU rounds them.
    y = reference.linear(x64, weight64, b64, norm64)
    near(triton.gemv(x, weight, b, norm), y, 3e-2)
    gated = reference.gated_linear(x64, weight64, b64, norm64)
    near(triton.gemv(x, weight, b, norm, gated=True), gated, 5e-2)
    total = torch.randn(1, width).to(BF16)
    expected = reference.add_linear(total.double(), x64, weight64, b64)
    assert triton.gemv(x, weight, b, out=total, add=True) is total
    near(total, expected, 1e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "width", "tiling"),
    [
        (2, 64, 48, Tiling(16, 32, 1, 3)),
        (5, 100, 38, Tiling(32, 32, 1, 3)),  # neither depth nor width fills its last tile
        (17, 192, 70, Tiling(16, 32, 3, 3)),
        (33, 200, 18, Tiling(16, 16, 4, 3)),  # the last part is shorter
        (3, 40, 6, Tiling(16, 16, 4, 3)),  # and here it has nothing to do
        (7, 1100, 66, None),
    ],
)
def test_skinny_and_what_rides_along(
    rows: int, depth: int, width: int, tiling: Tiling | None, bias: bool
) -> None:
    """In float16: of bfloat16 the interpreter's dot would multiply the bits."""
    x, gain = torch.randn(rows, depth).half(), torch.rand(depth).half()
    weight = (torch.randn(width, depth) / depth**0.5).half()
    b = torch.randn(width).half() if bias else None
    wide = [None if t is None else t.double() for t in (x, weight, b, gain)]
    x64, weight64, b64, gain64 = wide
    norm, norm64 = (gain, 1e-5), (gain64, 1e-5)
    expected = reference.linear(x64, weight64, b64)
    for _ in range(2):  # nothing is left over from the first time
        near(triton.skinny(x, weight, b, tiling=tiling), expected, 1e-3)
    out = torch.full((rows, width), torch.nan).half()
    assert triton.skinny(x, weight, b, norm, out=out, tiling=tiling) is out
    near(out, reference.linear(x64, weight64, b64, norm64), 2e-3)
    gated = reference.gated_linear(x64, weight64, b64, norm64)
    near(triton.skinny(x, weight, b, norm, gated=True, tiling=tiling), gated, 4e-3)
    total = torch.randn(rows, width).half()
    expected = reference.add_linear(total.double(), x64, weight64, b64)
    assert triton.skinny(x, weight, b, out=total, add=True, tiling=tiling) is total
    near(total, expected, 1e-3)


def test_tilings() -> None:
    """Parts keep the chip busy, are deep enough to be worth it, and fit what they are put in."""
    for rows in (16, 32, 64):
        for gated in (False, True):
            for depth in (64, 2048, 4096, 5120, 14336):
                for width in (64, 2560, 4096, 6144, 14336, 128256):
                    n, k, parts, stages, _ = choose_tiling(rows, width, depth, gated)
                    assert 3 <= stages and stages * (n * (1 + gated) + rows) * k * 2 <= 227 << 10
                    assert parts == 1 or depth >= 512 * parts
                    assert parts == 1 or width <= n * 1024  # room for arrivals
                    assert width // n * parts >= 90 or depth < 1024 * parts


@pytest.mark.parametrize(
    ("heads", "dim", "window", "scores"),
    [
        *product([(8, 2)], [32], [None, 20, 500], [(None, None)]),
        *product([(3, 3)], [24], [None, 20, 500], [(None, None)]),
        *product([(7, 1)], [16], [None, 20, 500], [(None, None)]),
        *product([(8, 2)], [32], [None, 20], [(0.9, None), (None, 1.5), (0.4, 2.0)]),
    ],
)
def test_decode_attention(
    heads: tuple[int, int], dim: int, window: int | None, scores: tuple[float | None, float | None]
) -> None:
    """Rows of one part and of several; parts that only a window leaves."""
    num_heads, kv_heads = heads
    contexts = [1, 17, 256, 300, 4000, 257]
    batch, kv, cache = make_case([(n, 1) for n in contexts], 16, kv_heads, 1, dim)
    q = torch.randn(len(contexts), num_heads, dim)
    plan = reference.plan_attention(batch, cache, window, None, *scores)
    reference.write_kv(cache, kv, plan)
    parts = triton.split_kv(batch.page_table, batch.slots, batch.context_lens, kv_heads, window)
    rows = [row for row in parts.items[0].tolist() if row >= 0]
    assert sorted(set(rows)) == list(range(len(contexts)))
    assert (len(rows) > len(contexts)) == (window != 20)
    expected = reference.attend(AttentionInputs(q), cache, plan).view_as(q)
    near(triton.decode_attention(q, cache, parts, None, *scores), expected, 1e-5)
    out = torch.full_like(q, torch.nan)
    # Nothing is left over from the first time.
    assert triton.decode_attention(q, cache, parts, out, *scores) is out
    near(out, expected, 1e-5)


@pytest.mark.parametrize(
    ("contexts", "window", "parts"),
    [
        ([8192] * 16, None, [3] * 16),  # as many as 384 programs for 8 heads are
        ([640] * 64, None, [1] * 64),  # a second part would be a short one
        ([383, 384, 1, 2600], None, [1, 2, 1, 7]),
        ([32768], None, [43]),
        ([100, 32768], 3000, [1, 12]),
        ([8191] + [5] * 70, 8000, [21] + [1] * 70),
    ],
)
def test_contexts_are_split_evenly(
    contexts: list[int], window: int | None, parts: list[int]
) -> None:
    lens, slots = torch.tensor(contexts), torch.arange(len(contexts)) + 3
    plan = triton.split_kv(torch.empty(0), slots, lens, 8, window)
    items = [item for item in plan.items.T.tolist() if item[0] >= 0]
    assert [row for row, *_ in items] == np.arange(len(parts)).repeat(parts).tolist()
    assert plan.starts.tolist() == [0, *np.cumsum(parts)]
    for row, length in enumerate(contexts):
        own = items[plan.starts[row] : plan.starts[row + 1]]
        assert [item[1:3] for item in own] == [[i, parts[row]] for i in range(parts[row])]
        begins, ends = [item[3] for item in own], [item[4] for item in own]
        assert begins == [max(0, length - (window or length)), *ends[:-1]] and ends[-1] == length
        sizes = [end - first for first, end in zip(begins, ends, strict=True)]
        assert sizes[:-1] == sizes[:1] * (len(own) - 1) and 0 < sizes[-1] <= sizes[0]
        assert {item[5] for item in own} == {row + 3}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("window", [20, 256, 300, 1000])
def test_decode_attention_in_chunks_and_with_sinks(window: int, chunked: bool) -> None:
    """Contexts that end before, at and after the end of a chunk, in one part and in several."""
    contexts = [1, 20, 21, 256, 257, 299, 301, 900]
    batch, kv, cache = make_case([(n, 1) for n in contexts], 16, 2, 1, 32)
    q = torch.randn(len(contexts), 6, 32)
    sinks = torch.tensor([3.0, -2.0, 300.0, -300.0, 0.0, 1.0])
    plan = reference.plan_attention(batch, cache, window, chunked=chunked)
    reference.write_kv(cache, kv, plan)
    parts = triton.split_kv(batch.page_table, batch.slots, batch.context_lens, 2, window, chunked)
    for some in (None, sinks):
        expected = reference.attend(AttentionInputs(q), cache, plan, sinks=some).view_as(q)
        near(triton.decode_attention(q, cache, parts, sinks=some), expected, 1e-5)
        out = torch.full_like(q, torch.nan)
        near(triton.decode_attention(q, cache, parts, out, sinks=some), expected, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "heads", "dim"),
    [
        (torch.bfloat16, (4, 2), 32),
        (torch.bfloat16, (2, 2), 16),
        (torch.float16, (3, 1), 24),
        (torch.float32, (2, 1), 7),
    ],
)
def test_decode_attention_over_a_float8_cache(
    dtype: torch.dtype, heads: tuple[int, int], dim: int
) -> None:
    """Every number of float8 in K and in V; rows of one part and of several."""
    num_heads, kv_heads = heads
    contexts = [1, 17, 257]
    batch, _, cache = make_case([(n, 1) for n in contexts], 16, kv_heads, 1, dim)
    codes = torch.arange(cache.numel()) * 7 % 254
    codes += codes // 127  # without 127 and 255, NaN
    exact = codes.to(torch.uint8).view(torch.float8_e4m3fn).view(cache.shape)
    q = (torch.randn(len(contexts), num_heads, dim) / 100).to(dtype)
    q[2, 0, 0] = 6e4 if dtype == torch.float16 else 1e5  # float16 ends at 65504
    plan = reference.plan_attention(batch, cache, None)
    parts = triton.split_kv(batch.page_table, batch.slots, batch.context_lens, kv_heads, None)
    expected = reference.attend(AttentionInputs(q.float()), exact.float(), plan).view(q.shape)
    out = triton.decode_attention(q, exact, parts)
    assert out.dtype == dtype
    near(out.float(), expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("heads", "dim"), [(4, 16), (20, 24), (3, 8)])
def test_sinks_are_applied_to_attention_without_them(heads: int, dim: int) -> None:
    tokens, keys = 5, 9
    scores, values = torch.randn(tokens, heads, keys), torch.randn(heads, keys, dim)
    sinks = torch.randn(heads)
    sinks[0], sinks[-1] = 60.0, -60.0
    out = torch.einsum("thk,hkd->thd", scores.softmax(-1), values).contiguous()
    lse = scores.logsumexp(-1) / math.log(2)
    triton.apply_sinks(out, lse, sinks)
    one_more = torch.cat((scores, sinks[None, :, None].expand(tokens, -1, 1)), -1)
    expected = torch.einsum("thk,hkd->thd", one_more.softmax(-1)[..., :-1], values)
    near(out, expected, 1e-5)


HEAD_NORMS: dict[str, dict[str, bool] | None] = {
    "none": None,
    "before": {},
    "after": {"after": True},
    "plus one": {"plus_one": True},
    "after, plus one": {"after": True, "plus_one": True},
    "whole": {},
}


@pytest.mark.parametrize("norm", HEAD_NORMS)
@pytest.mark.parametrize("rotation", [None, "halves", "interleaved"])
def test_rotation_and_store(norm: str, rotation: str | None) -> None:
    heads, kv_heads, dim = 6, 3, 24
    batch, _, cache = make_case([(9, 1), (20, 11)], 16, kv_heads, head_dim=dim)
    qkv = torch.randn(12, heads + 2 * kv_heads, dim)
    head_norm: HeadNorm | None = None
    if (options := HEAD_NORMS[norm]) is not None:
        head_norm = HeadNorm(torch.rand(heads + kv_heads, dim) + 0.5, 1e-5, **options)
    if norm == "whole" and head_norm is not None:
        means = triton.mean_squares(qkv, heads)
        near(means, reference.mean_squares(qkv, heads), 1e-6)
        head_norm = head_norm._replace(means=means)
    query_scale = torch.rand(12) + 0.5 if norm in ("none", "after", "whole") else None
    angles = torch.rand(100, 8) * 6
    tables = angles.cos(), angles.sin()
    interleaved = rotation == "interleaved"
    there = cache.clone()
    q, kept = triton.rotate_and_store(
        qkv,
        heads,
        head_norm,
        None if rotation is None else RotaryInputs(*tables, interleaved, batch.positions),
        there,
        PagedPlan(batch.cache_index, keeps=True),
        query_scale,
    )
    rotary = None
    if rotation is not None:
        rotary = reference.rotary_inputs(*tables, batch.positions, torch.float32, interleaved)
    plan = reference.plan_attention(batch, cache, None)
    args = (qkv, heads, head_norm, rotary, cache, plan, query_scale)
    near(q, reference.rotate_and_store(*args).q, 1e-5)
    torch.testing.assert_close(there, cache, rtol=1e-4, atol=1e-5, equal_nan=True)
    page, offset = batch.cache_index // 16, batch.cache_index % 16
    near(kept.unflatten(1, (2, kv_heads)), cache[page, :, offset], 1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "dim", "turn"),
    [((1, 1), 2, 2), ((5, 2), 24, 24), ((17, 3), 22, 10), ((6, 1), 7, 4), ((2, 2), 40, 6)],
)
def test_rotation_and_store_bit_for_bit(
    heads: tuple[int, int], dim: int, turn: int, interleaved: bool
) -> None:
    """Of sizes that no block divides. Products of bfloat16 are exact in float32, so that it makes
    no difference whether they are rounded before they are added.
    """
    num_heads, kv_heads = heads
    batch, _, cache = make_case([(9, 1), (20, 11)], 16, kv_heads, head_dim=dim)
    qkv = torch.randn(12, num_heads + 2 * kv_heads, dim).to(BF16).float()
    cos, sin = torch.randn(2, 100, turn // 2).to(BF16).float()
    there = cache.clone()
    rotary = RotaryInputs(cos, sin, interleaved, batch.positions)
    plan = PagedPlan(batch.cache_index, keeps=True)
    q, kept = triton.rotate_and_store(qkv, num_heads, None, rotary, there, plan)
    assert torch.equal(triton.rotate(qkv, rotary)[:, :num_heads], q)
    rotary = reference.rotary_inputs(cos, sin, batch.positions, torch.float32, interleaved)
    slow = reference.plan_attention(batch, cache, None)
    args = (qkv.clone(), num_heads, None, rotary, cache, slow)
    assert torch.equal(q, reference.rotate_and_store(*args).q)
    torch.testing.assert_close(there, cache, rtol=0, atol=0, equal_nan=True)
    page, offset = batch.cache_index // 16, batch.cache_index % 16
    assert torch.equal(kept.unflatten(1, (2, kv_heads)), cache[page, :, offset])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(6, 72), (2, 80), (20, 64), (32, 128), (17, 8)])
def test_rotation_alone(heads: int, dim: int, interleaved: bool) -> None:
    """Of the first heads of wider rows, as queries and keys are of a product."""
    rows = torch.randn(5, heads + 3, dim)
    x = rows[:, :heads]
    there = rows.clone()
    angles = torch.rand(9, dim // 2) * 6
    tables = angles.cos(), angles.sin()
    positions = torch.tensor([8, 0, 3, 3, 7])
    rotary = reference.rotary_inputs(*tables, positions, torch.float32, interleaved)
    exact = reference.rotate(x.double(), rotary)
    kernel_inputs = RotaryInputs(*tables, interleaved, positions)
    near(triton.rotate(x, kernel_inputs), exact, 1e-6)
    assert torch.equal(rows, there)
    # Rounded once, from float32.
    half = x.half()
    found = triton.rotate(half, kernel_inputs)
    assert found.dtype == torch.float16
    near(found, reference.rotate(half.double(), rotary), 5e-4)
    near(reference.rotate(half.clone(), rotary), reference.rotate(half.double(), rotary), 5e-4)


def some_logits(tokens: int, num_experts: int, likely: float) -> Tensor:
    """Router's logits that make the first expert the more popular, the larger `likely` is."""
    logits = torch.randn(tokens, num_experts)
    logits[:, 0] += likely
    return logits


# Kinds of routing that families have, and sizes that fill neither the experts' nor a group's
# columns.
ROUTINGS: dict[str, tuple[int, Routing]] = {
    "mixtral": (8, Routing(2, renorm=True)),
    "every expert": (5, Routing(5, renorm=True)),
    "qwen2": (60, Routing(4, renorm=False)),
    "one": (3, Routing(1, renorm=False)),
    "ernie": (12, Routing(3, renorm=True, biased=True, least_sum=0.3)),
    "llama4": (6, Routing(1, renorm=False, scoring="sigmoid")),
    "glm": (10, Routing(4, True, "sigmoid", biased=True, sum_eps=1e-20, scale=2.5)),
    "deepseek v2": (20, Routing(6, False, groups=4, kept_groups=3, scale=16.0)),
    "deepseek v2, odd groups": (15, Routing(2, False, groups=3, kept_groups=1)),
    "deepseek v3": (
        24,
        Routing(4, True, "sigmoid", True, groups=6, kept_groups=3, sum_eps=1e-20, scale=2.5),
    ),
}


def bias_of(num_experts: int, routing: Routing, spread: float = 0.3) -> Tensor | None:
    return spread * torch.randn(num_experts) if routing.biased else None


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 3, 150])
def test_route(name: str, tokens: int) -> None:
    num_experts, routing = ROUTINGS[name]
    logits, bias = 2 * torch.randn(tokens, num_experts), bias_of(num_experts, routing)
    weights, chosen = triton.route(logits, routing, bias)
    expected_weights, expected = reference.route(logits, routing, bias)
    near(weights, expected_weights, 1e-6)
    assert chosen.dtype == torch.int32 and torch.equal(chosen, expected)
    assert triton.route(logits[:0], routing, bias)[1].shape == (0, routing.top_k)
    biases = None if bias is None else bias.tolist()
    for row, pairs in enumerate(zip(weights.tolist(), chosen.tolist(), strict=True)):
        naive = naive_routing.route(logits[row].tolist(), routing, biases)
        assert list(naive) == pairs[1]
        assert list(naive.values()) == pytest.approx(pairs[0], rel=1e-5)


BOTH = pytest.mark.parametrize("route", [triton.route, reference.route], ids=["kernel", "twin"])


@BOTH
def test_of_equal_choices_the_first_experts_are_taken(route: Route) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    assert route(logits, Routing(3, True), None)[1].tolist() == [[1, 3, 0]]
    sigmoid = Routing(3, True, "sigmoid")
    saturated = torch.tensor([[40.0, 90.0, 50.0, -300.0]])  # all scores but one are 1
    assert route(saturated, sigmoid, None)[1].tolist() == [[1, 2, 0]]
    biased = replace(sigmoid, biased=True)
    assert route(saturated, biased, torch.zeros(4))[1].tolist() == [[0, 1, 2]]
    grouped = replace(biased, groups=2, kept_groups=1, top_k=2)
    assert route(torch.zeros(1, 4), grouped, torch.zeros(4))[1].tolist() == [[0, 1]]


@BOTH
def test_a_bias_chooses_but_does_not_weigh(route: Route) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([10.0, 0.0, 5.0, -10.0])
    weights, chosen = route(logits, Routing(2, False, "sigmoid", biased=True), bias)
    assert chosen.tolist() == [[0, 2]]
    near(weights, torch.tensor([[0.5, 0.880797]]), 1e-6)
    weights, chosen = route(logits, Routing(2, True, biased=True, scale=3.0), bias)
    assert chosen.tolist() == [[0, 2]]
    near(weights, 3 * logits[:, [0, 2]].softmax(1), 1e-6)


@BOTH
def test_groups_are_ranked_by_the_best_or_by_two(route: Route) -> None:
    """Group 0 has the best expert, group 1 the best two; all others are dropped, also if better."""
    logits = torch.tensor([[5.0, 0.0, 0.1, 2.0, 2.0, 0.1, 1.0, 1.0, 1.0]])
    groups = Routing(2, False, groups=3, kept_groups=1)
    assert route(logits, groups, None)[1].tolist() == [[0, 2]]
    two = replace(groups, scoring="sigmoid", biased=True)
    assert route(logits, two, torch.zeros(9))[1].tolist() == [[3, 4]]
    # Experts of a kept group are chosen before those of a dropped one, however low they are.
    bias = torch.tensor([0.0] * 3 + [-100.0] * 3 + [-200.0] * 3)
    assert route(logits, replace(two, kept_groups=2, top_k=5), bias)[1].tolist() == [
        [0, 2, 1, 3, 4]
    ]


@BOTH
def test_sums_are_kept_from_zero(route: Route) -> None:
    """Ernie's least sum is a limit, DeepSeek's epsilon is added."""
    logits, bias = torch.tensor([[-1.0, -1.0, 3.0]]), torch.tensor([9.0, 8.0, 0.0])
    routing = Routing(2, True, biased=True, least_sum=0.25)
    weights, _ = route(logits, routing, bias)
    near(weights, logits.softmax(1)[:, :2] / 0.25, 1e-6)
    weights, _ = route(logits, replace(routing, least_sum=1e-12), bias)
    near(weights, torch.tensor([[0.5, 0.5]]), 1e-6)
    sigmoid = Routing(2, True, "sigmoid", biased=True, sum_eps=1.0)
    weights, _ = route(logits, sigmoid, bias)
    score = logits.sigmoid()[:, :2]
    near(weights, score / (score.sum() + 1), 1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@BOTH
@pytest.mark.parametrize("name", [name for name in ROUTINGS if name != "one"])
def test_logits_that_are_no_numbers_still_give_experts(name: str, route: Route) -> None:
    num_experts, routing = ROUTINGS[name]
    odd = torch.tensor([torch.nan, -torch.inf, torch.inf, 3e38, -3e38])
    logits = torch.randn(40, num_experts)
    strange = torch.rand(logits.shape) < 0.6
    logits[strange] = odd[torch.randint(0, 5, (int(strange.sum()),))]
    logits[0], logits[1], logits[2] = torch.nan, -torch.inf, torch.inf
    biases = [None]
    if routing.biased:
        biases = [odd[torch.randint(0, 5, (num_experts,))] for _ in range(3)]
        biases += [torch.full((num_experts,), x) for x in (torch.nan, -torch.inf, torch.inf)]
    for bias in biases:
        _, chosen = route(logits, routing, bias)
        for row in chosen.tolist():
            assert len(set(row)) == routing.top_k and set(row) <= set(range(num_experts))


@BOTH
def test_numbers_are_chosen_before_nan(route: Route) -> None:
    logits = torch.tensor([[torch.nan, -1.0, torch.nan, -2.0]])
    assert route(logits, Routing(3, True, "sigmoid"), None)[1].tolist() == [[1, 3, 0]]
    biased = Routing(3, True, "sigmoid", biased=True)
    assert route(logits, biased, torch.zeros(4))[1].tolist() == [[1, 3, 0]]


@pytest.mark.parametrize("held", [(0, 6), (2, 3), (5, 1)])
@pytest.mark.parametrize("tokens", [1, 40, 2500])
def test_pairs_are_sorted_by_expert(tokens: int, held: tuple[int, int]) -> None:
    """In one program and in several."""
    (first, count), block = held, 16
    experts = torch.rand(tokens, 5).argsort(1)[:, :2].int()  # and nobody's is the last one
    order, groups = moe.sort_pairs(experts, first, count, block)
    blocks = 0
    for i in range(count):
        begin, end, last = groups[:, i].tolist()
        pairs = (experts.flatten() == first + i).nonzero()[:, 0]
        assert order[begin:end].tolist() == pairs.tolist()
        blocks += -(-len(pairs) // block)
        assert last == blocks
    assert (groups[2, count:] == blocks).all()  # programs beyond the last block must find no expert


# Sizes that no tile divides; and, of one expert, no token, one, and several blocks of tokens.
@pytest.mark.parametrize(("held", "add"), [((0, 6), True), ((1, 3), False), ((5, 1), True)])
@pytest.mark.parametrize(("tokens", "likely"), [(1, 0.0), (9, 0.0), (40, 9.0)])
@pytest.mark.parametrize(("dim", "hidden"), [(40, 24), (72, 80)])
def test_experts(
    dim: int, hidden: int, tokens: int, likely: float, held: tuple[int, int], add: bool
) -> None:
    x, total = torch.randn(tokens, dim), torch.randn(tokens, dim)
    routing = reference.route(some_logits(tokens, 6, likely), Routing(2, True), None)
    gate_up = torch.randn(held[1], 2 * hidden, dim) / dim**0.5
    down = torch.randn(held[1], dim, hidden) / hidden**0.5
    args = (x, *routing, gate_up, down, held[0], 6)
    expected = reference.sum_experts(*args, total.clone() if add else None)
    out = triton.sum_experts(*args, total if add else None)
    assert (out is total) == add
    near(out, expected, 1e-5)


@pytest.mark.parametrize("tiles", [tiles for _, tiles in moe._TILES], ids=str)
def test_every_size_of_a_block(tiles: moe.Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "_EXACT_TILES", tiles)
    x, gate_up, down = torch.randn(150, 80), torch.randn(3, 96, 80) / 9, torch.randn(3, 80, 48) / 7
    args = (
        x,
        *reference.route(some_logits(150, 3, 4.0), Routing(2, False), None),
        gate_up,
        down,
        0,
        3,
    )
    near(triton.sum_experts(*args), reference.sum_experts(*args), 1e-5)


@pytest.mark.parametrize("top_k", [1, 3])
def test_weights_on_the_input_of_experts(top_k: int) -> None:
    x, gate_up, down = torch.randn(9, 40), torch.randn(4, 48, 40) / 6, torch.randn(4, 40, 24) / 5
    routing = reference.route(torch.randn(9, 6), Routing(top_k, False, "sigmoid"), None)
    args = (x, *routing, gate_up, down, 1, 6)
    out = triton.sum_experts(*args, on_input=True)
    near(out, reference.sum_experts(*args, on_input=True), 1e-5)
    assert (out - triton.sum_experts(*args)).abs().max() > 0.01
    total = torch.randn(9, 40)
    expected = total + out
    near(triton.sum_experts(*args, total, on_input=True), expected, 1e-5)


@pytest.mark.parametrize("clamp", [None, Clamp(0.5, 1.702)])
def test_biases_and_clamped_activations_of_experts(clamp: Clamp | None) -> None:
    x, gate_up, down = torch.randn(9, 40), torch.randn(4, 48, 40) / 6, torch.randn(4, 40, 24) / 5
    biases = torch.randn(4, 48), torch.randn(4, 40)
    args = (x, *reference.route(torch.randn(9, 6), Routing(2, True), None), gate_up, down, 1, 6)
    right = reference.sum_experts(*args, biases=biases, clamp=clamp)
    near(triton.sum_experts(*args, biases=biases, clamp=clamp), right, 1e-5)
    for left in ((None, biases[1]), (biases[0], None)):
        out = triton.sum_experts(*args, biases=left, clamp=clamp)
        near(out, reference.sum_experts(*args, biases=left, clamp=clamp), 1e-5)
        assert (out - right).abs().max() > 0.01
    other = triton.sum_experts(*args, biases=biases, clamp=Clamp(0.6, 1.702))
    assert (other - right).abs().max() > 0.01


def test_a_clamp_keeps_nan() -> None:
    """A comparison with NaN is false: the limit must not take its place."""
    x, gate_up, down = torch.randn(2, 16), torch.randn(1, 32, 16), torch.randn(1, 16, 16)
    x[1, 3] = torch.nan
    args = (x, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), gate_up, down, 0, 1)
    for ops in (triton, reference):
        out = ops.sum_experts(*args, clamp=Clamp(7.0, 1.702))
        assert out[1].isnan().all() and not out[0].isnan().any()


def test_experts_in_half_precision() -> None:
    """In float16: of bfloat16 the interpreter has no products."""
    x, gate_up, down = torch.randn(9, 64), torch.randn(4, 96, 64) / 8, torch.randn(4, 64, 48) / 7
    routing = reference.route(torch.randn(9, 4), Routing(2, True), None)
    x, gate_up, down = (t.half() for t in (x, gate_up, down))
    wide = x.double(), *routing, gate_up.double(), down.double()
    near(
        triton.sum_experts(x, *routing, gate_up, down, 0, 4),
        reference.sum_experts(*wide, 0, 4),
        2e-3,
    )


def test_no_experts_and_no_tokens() -> None:
    x, total = torch.randn(3, 8), torch.randn(3, 8)
    routing = reference.route(torch.randn(3, 4), Routing(2, True), None)
    none = torch.randn(0, 12, 8), torch.randn(0, 8, 6), 4, 4
    assert torch.equal(triton.sum_experts(x, *routing, *none), torch.zeros(3, 8))
    assert triton.sum_experts(x, *routing, *none, total) is total
    empty = [t[:0] for t in (x, *routing)]
    some = torch.randn(4, 12, 8), torch.randn(4, 8, 6), 0, 4
    assert triton.sum_experts(*empty, *some).shape == (0, 8)


@pytest.mark.parametrize("kind", [torch.Tensor, RoundedRows, PackedWeight])
def test_powers_of_two_of_tokens_meet_every_size_of_a_block(kind: type) -> None:
    for top_k, num_experts in ((8, 128), (2, 8), (4, 60), (8, 64), (1, 16)):
        powers = {moe.choose_tiles(2**i, top_k, num_experts, kind) for i in range(14)}
        assert powers == {moe.choose_tiles(n, top_k, num_experts, kind) for n in range(1, 8193)}


def test_list_pages() -> None:
    table = torch.randint(0, 1 << 20, (9, 1110))
    counts = [0, 1, 1100, 17]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    slots = torch.randperm(9)[: len(counts)]
    firsts = torch.arange(len(counts)).int()
    out = torch.full((sum(counts) + 5,), -1, dtype=torch.int32)
    expected = out.clone()
    triton.list_pages(table, slots, starts, firsts, 1100, out)
    reference.list_pages(table, slots, starts, firsts, 1100, expected)
    assert torch.equal(out, expected)
