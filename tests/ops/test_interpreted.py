"""The Triton kernels against their slow twins without a GPU, in Triton's interpreter.

Small shapes: the interpreter is slow. Outputs begin as NaN. On a GPU, test_gpu_kernels.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from test_reference import make_case
from torch import Tensor

from gllm_engine.ops import AttentionInputs, HeadNorm, reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)
from gllm_engine.ops import triton  # noqa: E402
from gllm_engine.ops.triton import moe  # noqa: E402
from gllm_engine.ops.triton.skinny import Tiling, choose_tiling  # noqa: E402

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
    near(triton.silu_mul(wide), reference.silu_mul(wide), 1e-6)
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


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
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
    contexts = [1, 17, 256, 300, 900, 257]
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
        None if rotation is None else tables,
        None if rotation is None else batch.positions,
        interleaved,
        there,
        batch.cache_index,
        keeps_kv=True,
        query_scale=query_scale,
    )
    rotary = None
    if rotation is not None:
        rotary = reference.rotary_inputs(*tables, batch.positions, torch.float32, interleaved)
    plan = reference.plan_attention(batch, cache, None)
    args = (qkv, heads, head_norm, rotary, interleaved, cache, plan, query_scale)
    near(q, reference.rotate_and_store(*args).q, 1e-5)
    torch.testing.assert_close(there, cache, rtol=1e-4, atol=1e-5, equal_nan=True)
    page, offset = batch.cache_index // 16, batch.cache_index % 16
    near(kept.unflatten(1, (2, kv_heads)), cache[page, :, offset], 1e-5)


def some_logits(tokens: int, num_experts: int, likely: float) -> Tensor:
    """Router's logits that make the first expert the more popular, the larger `likely` is."""
    logits = torch.randn(tokens, num_experts)
    logits[:, 0] += likely
    return logits


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("experts", [(8, 2), (5, 5), (60, 4), (3, 1)])
def test_route(experts: tuple[int, int], renorm: bool) -> None:
    num_experts, top_k = experts
    for tokens in (1, 3, 150):
        logits = torch.randn(tokens, num_experts)
        weights, chosen = triton.route(logits, top_k, renorm)
        expected_weights, expected = reference.route(logits, top_k, renorm)
        near(weights, expected_weights, 1e-6)
        assert chosen.dtype == torch.int32 and torch.equal(chosen, expected)
    assert triton.route(logits[:0], top_k, renorm)[1].shape == (0, top_k)


def test_of_equally_likely_experts_the_first_are_taken() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    for route in (triton.route, reference.route):
        assert route(logits, 3, True)[1].tolist() == [[1, 3, 0]]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_logits_that_are_no_numbers_still_give_experts() -> None:
    logits = torch.randn(4, 6)
    logits[0], logits[1, 2], logits[2, 3] = torch.nan, torch.nan, -torch.inf
    _, chosen = triton.route(logits, 3, True)
    assert all(len(set(row)) == 3 and set(row) <= set(range(6)) for row in chosen.tolist())


@pytest.mark.parametrize("held", [(0, 6), (2, 3), (5, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 2500])
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
    routing = reference.route(some_logits(tokens, 6, likely), 2, True)
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
    args = (x, *reference.route(some_logits(150, 3, 4.0), 2, False), gate_up, down, 0, 3)
    near(triton.sum_experts(*args), reference.sum_experts(*args), 1e-5)


def test_experts_in_half_precision() -> None:
    """In float16: of bfloat16 the interpreter has no products."""
    x, gate_up, down = torch.randn(9, 64), torch.randn(4, 96, 64) / 8, torch.randn(4, 64, 48) / 7
    routing = reference.route(torch.randn(9, 4), 2, True)
    x, gate_up, down = (t.half() for t in (x, gate_up, down))
    wide = x.double(), *routing, gate_up.double(), down.double()
    near(
        triton.sum_experts(x, *routing, gate_up, down, 0, 4),
        reference.sum_experts(*wide, 0, 4),
        2e-3,
    )


def test_no_experts_and_no_tokens() -> None:
    x, total = torch.randn(3, 8), torch.randn(3, 8)
    routing = reference.route(torch.randn(3, 4), 2, True)
    none = torch.randn(0, 12, 8), torch.randn(0, 8, 6), 4, 4
    assert torch.equal(triton.sum_experts(x, *routing, *none), torch.zeros(3, 8))
    assert triton.sum_experts(x, *routing, *none, total) is total
    empty = [t[:0] for t in (x, *routing)]
    some = torch.randn(4, 12, 8), torch.randn(4, 8, 6), 0, 4
    assert triton.sum_experts(*empty, *some).shape == (0, 8)


def test_powers_of_two_of_tokens_meet_every_size_of_a_block() -> None:
    for top_k, num_experts in ((8, 128), (2, 8), (4, 60), (8, 64), (1, 16)):
        powers = {moe.choose_tiles(2**i, top_k, num_experts) for i in range(14)}
        assert powers == {moe.choose_tiles(n, top_k, num_experts) for n in range(1, 8193)}


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
