"""FP8 weights: the slow twin by hand, and the kernels against the twin in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from test_ops_protocol import without_flashinfer
from torch import Tensor

from gllm_engine.ops import Fp8Weight, RoundedRows, quantize_fp8, reference

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16


def near(out: Tensor, expected: Tensor, limit: float) -> None:
    out, expected = out.double(), expected.double()
    assert out.shape == expected.shape and out.isfinite().all()
    assert (out - expected).norm() <= limit * expected.norm()


def made(width: int, depth: int, rows: int, columns: int, lead: int = 0, seed: int = 0) -> Any:
    """A weight, or a stack of `lead`, with a scale per block of rows x columns, and its numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (max(lead, 1), width, depth)
    numbers = (torch.randn(shape, generator=generator) * 60).to(FP8)
    grid = (shape[0], -(-width // rows), -(-depth // columns))
    scales = torch.rand(grid, generator=generator) / depth**0.5 / 30 + 1e-5
    exact = numbers.float()
    for e in range(shape[0]):
        for i in range(width):
            for j in range(grid[2]):
                exact[e, i, j * columns : (j + 1) * columns] *= scales[e, i // rows, j]
    if not lead:
        numbers, scales, exact = numbers[0], scales[0], exact[0]
    return Fp8Weight(numbers, scales, rows, columns), exact


SIZES = [(24, 40, 1, 40), (32, 64, 16, 16), (40, 70, 16, 32), (9, 20, 128, 128)]


@pytest.mark.parametrize("size", SIZES)
def test_twin(size: tuple[int, int, int, int]) -> None:
    weight, exact = made(*size)
    x = torch.randn(3, size[1])
    assert torch.equal(weight.dequantized(torch.float32), exact)
    assert torch.equal(weight.dequantized(BF16), exact.to(BF16))
    assert torch.equal(reference.linear(x, weight), x @ exact.T)
    stack, exacts = made(*size, lead=3)
    assert len(stack) == 3 and stack.shape == exacts.shape
    assert torch.equal(stack.dequantized(torch.float32), exacts)
    assert torch.equal(stack[1].dequantized(torch.float32), exacts[1])
    some = slice(5, 17)
    assert torch.equal(weight.rows(some).dequantized(torch.float32), exact[some])
    assert torch.equal(stack.rows(some).dequantized(torch.float32), exacts[:, some])
    moved = replace(weight, scale_row=torch.arange(size[0]).flip(0) // weight.rows_per_scale)
    assert torch.equal(moved.rows(some).dequantized(BF16), moved.dequantized(BF16)[some])


@pytest.mark.parametrize("size", [(16, 32), (0, 0), (1, 0), (7, 9)])
def test_quantizing(size: tuple[int, int]) -> None:
    """Every block uses all of float8's range, and a number moves by at most a sixteenth."""
    matrix = torch.randn(40, 70)
    matrix[:16, :32] *= 1e-3
    numbers, scales = quantize_fp8(matrix, *size)
    rows = size[0] or 40
    columns = size[1] or 70
    assert scales.shape == (-(-40 // rows), -(-70 // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            assert numbers[place].float().abs().max() == 448
            back = numbers[place].float() * scales[i, j]
            least = scales[i, j] * 2**-10  # half of float8's smallest number
            limit = (matrix[place].abs() / 15.9).clamp(min=least)
            assert ((back - matrix[place]).abs() <= limit).all()
    numbers, scales = quantize_fp8(torch.zeros(4, 4), 2, 2)
    assert not numbers.float().any() and scales.isfinite().all()


pytest.importorskip("triton")
# The interpreter's own, in a loop whose length a kernel has loaded.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"
)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("columns", [None, 32])
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (16, 96), (21, 200), (3, 2400)])
def test_input_in_float8(rows: int, dim: int, columns: int | None, dtype: torch.dtype) -> None:
    """Bit for bit where no number is rounded: the interpreter rounds in its own way."""
    from gllm_engine.ops import triton

    group = columns or dim
    x = torch.randint(-120, 121, (rows, dim)).to(torch.uint8).view(FP8).float().nan_to_num(1.0)
    x[:, ::32] = 448.0
    x *= torch.randint(-3, 4, (rows, 1)).exp2()
    x[0, :32] = 0
    twin, twin_scales = quantize_fp8(x, 1, group)
    found = triton.quantize(x.to(dtype), columns)
    assert found.shape == x.shape and found.dtype == dtype
    numbers = found.numbers
    scales = found.scales
    padded = -(-rows // 16) * 16
    assert numbers.shape == (padded, dim) and scales.shape == (padded, -(-dim // group))
    assert scales.stride()[0] == 1
    assert torch.equal(numbers[:rows].float(), twin.float())
    assert not numbers[rows:].float().any() and scales.isfinite().all()
    back = numbers.float() * scales.repeat_interleave(group, 1)[:, :dim]
    assert torch.equal(back[:rows], x)
    torch.testing.assert_close(scales[1:rows], twin_scales[1:])


@interpreted
@pytest.mark.parametrize("columns", [None, 32])
def test_input_in_float8_after_its_norm(columns: int | None) -> None:
    from gllm_engine.ops import triton

    x, gain = torch.randn(5, 96), torch.rand(96) + 0.5
    found = triton.quantize(x, columns, (gain, 0.1))
    scales = found.scales
    back = found.numbers.float() * scales.repeat_interleave(columns or 96, 1)[:, :96]
    normed = reference.rms_norm(x, gain, 0.1)
    near(back[:5], normed, 0.08)
    _, expected = quantize_fp8(normed, 1, columns or 96)
    torch.testing.assert_close(scales[:5], expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("columns", [None, 32])
@pytest.mark.parametrize(
    ("act", "gated"), [("silu", True), ("silu", False), ("gelu", True), ("gelu_tanh", True)]
)
def test_input_in_float8_after_its_activation(
    act: str, gated: bool, columns: int | None, dtype: torch.dtype
) -> None:
    """The same bits as of two kernels, one after the other."""
    from gllm_engine.ops import triton

    x = torch.randn(5, 144 * (1 + gated)).to(dtype)
    found = triton.quantize(x, columns, act=(act, gated))
    expected = triton.quantize(triton.activate(x, act, gated), columns)
    assert found.shape == (5, 144) and found.dtype == dtype
    assert torch.equal(found.numbers.view(torch.uint8), expected.numbers.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales) and found.scales.stride()[0] == 1
    assert found.numbers[:5].float().abs().amax() > 400
    assert triton.quantize(found, columns) is found


@interpreted
@pytest.mark.parametrize("size", SIZES)
def test_weight_back_to_numbers(size: tuple[int, int, int, int]) -> None:
    from gllm_engine.ops import triton

    weight, exact = made(*size)
    assert torch.equal(triton.dequantize(weight, torch.float32), exact)
    other = replace(weight, scale_row=torch.randint(0, len(weight.scales), (size[0],)))
    first = min(weight.columns_per_scale, size[1]) // 3
    other = replace(other, numbers=other.numbers[:, first:].contiguous(), first_column=first)
    expected = other.dequantized(torch.float32)
    assert torch.equal(triton.dequantize(other, torch.float32), expected)


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (16, 16), (32, 64)])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("tokens", "held"), [(1, (0, 6)), (40, (1, 3))])
def test_experts(
    rows: int, columns: int, indexed: bool, tokens: int, held: tuple[int, int]
) -> None:
    from gllm_engine.ops import triton

    dim, hidden = 80, 32
    first, count = held
    gate_up, _ = made(2 * hidden, dim, rows, columns or dim, count)
    down, _ = made(dim, hidden, rows, columns or hidden, count, seed=1)
    if indexed:  # any row of scales for any row; and the rest of a first block
        index = torch.randint(0, gate_up.scales.shape[1], (2 * hidden,))
        gate_up = replace(gate_up, scale_row=index)
    if indexed and columns:
        down, _ = made(dim, hidden + 16, rows, columns, count, seed=1)
        down = replace(down, numbers=down.numbers[..., 16:].contiguous(), first_column=16)
    x = torch.randn(tokens, dim)
    routing = torch.rand(tokens, 2), torch.rand(tokens, 6).argsort(1)[:, :2].int().contiguous()
    args = (x, *routing, gate_up, down, first, 6)
    near(triton.sum_experts(*args), reference.sum_experts(*args), 1e-5)


def some_float8(rows: int, depth: int, dtype: torch.dtype) -> Tensor:
    """Numbers that are still the same when they are rounded to float8, a row or a group at once."""
    x = torch.randint(-120, 121, (rows, depth)).to(torch.uint8).view(FP8).float().nan_to_num(1.0)
    x[:, ::32] = 448.0
    return (x * torch.randint(-7, -3, (rows, 1)).exp2()).to(dtype)


def offset(weight: Fp8Weight, first: int) -> Fp8Weight:
    """Without its first columns, and any row of scales for any row."""
    index = torch.randint(0, len(weight.scales), (len(weight),))
    numbers = weight.numbers[:, first:].contiguous()
    return replace(weight, numbers=numbers, scale_row=index, first_column=first)


# width, depth, rows and columns of a block, columns cut off (None: whole)
WEIGHTS = {
    "rows": (24, 160, 1, 160, None),
    "rows, odd": (9, 101, 1, 101, None),
    "rows, a part": (24, 160, 1, 160, 64),
    "blocks": (140, 384, 128, 128, None),
    "ragged blocks": (70, 200, 128, 128, None),
    "blocks, a part": (70, 384, 64, 128, 64),
    "small blocks": (22, 200, 16, 32, 96),
    "one block": (10, 96, 128, 128, None),
}


def made_weight(name: str) -> tuple[Fp8Weight, Tensor]:
    """A weight of WEIGHTS, and its exact numbers."""
    *size, first = WEIGHTS[name]
    weight, _ = made(*size)
    weight = weight if first is None else offset(weight, first)
    return weight, weight.dequantized(torch.float64)


def check_product(
    product: Callable[..., Tensor], x: Tensor, weight: Fp8Weight, exact: Tensor, limit: float
) -> None:
    """With a bias and without, gated, and added to a sum."""
    width = len(weight)
    x64 = x.double()
    near(product(x, weight), reference.linear(x64, exact), limit)
    bias = torch.randn(width).to(x.dtype)
    out = torch.full((len(x), width), torch.nan).to(x.dtype)
    assert product(x, weight, bias, out=out) is out
    near(out, reference.linear(x64, exact, bias.double()), limit)
    if width % 2 == 0:
        gated = reference.gated_linear(x64, exact, bias.double(), None)
        near(product(x, weight, bias, gated=True), gated, 3 * limit)
    total = torch.randn(len(x), width).to(x.dtype)
    expected = reference.add_linear(total.double(), x64, exact, None)
    assert product(x, weight, out=total, add=True) is total
    near(total, expected, limit)


def check_experts(weight: Fp8Weight, gated: bool, tokens: int) -> None:
    """The grouped product of a stack with rows that rounding leaves as they are."""
    from gllm_engine.ops.triton import moe, quantize

    top_k, first, held = 2, 1, len(weight)
    experts = torch.rand(tokens, held + 2).argsort(1)[:, :top_k].int().contiguous()
    for tiles in (
        moe.Tiles(16, 64, 128, 4, 3),
        moe.Tiles(64, 64, 128, 4, 3),
        moe.Tiles(128, 256, 128, 8, 3, True),
    ):
        order, groups = moe.sort_pairs(experts, first, held, tiles.rows)
        x = some_float8(tokens if gated else tokens * top_k, weight.shape[2], torch.float16)
        blocks = weight.scales.shape[2] > 1
        args = (quantize(x, 128 if blocks else None), weight, order, groups, top_k, tiles, gated)
        found = moe.grouped_product(*args)
        assert isinstance(found, torch.Tensor)
        assert found.dtype == torch.float16
        for place, pair in enumerate(order[: int(groups[1, held - 1])].tolist()):
            expert = experts.flatten()[pair] - first
            exact = weight[int(expert)].dequantized(torch.float64)
            row = x[pair // top_k if gated else place].double()[None]
            product = reference.gated_linear if gated else reference.linear
            right = product(row, exact, None, None) if gated else product(row, exact)
            near(found[place if gated else pair][None], right, 3e-3)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["rows", "blocks", "ragged blocks", "blocks, a part"])
def test_rounded_experts(name: str, gated: bool) -> None:
    width, depth, rows, columns, cut = WEIGHTS[name]
    stack, _ = made(width, depth, rows, columns, 3)
    if cut is not None:
        index = torch.randint(0, stack.scales.shape[1], (width,))
        numbers = stack.numbers[..., cut:].contiguous()
        stack = replace(stack, numbers=numbers, scale_row=index, first_column=cut)
    check_experts(stack, gated, 6)


@interpreted
@pytest.mark.parametrize("width", [160, 256, 320])
def test_a_gated_product_is_rounded_for_the_next_one(width: int) -> None:
    """As by a kernel of its own, if a program has all columns of a scale."""
    from gllm_engine.ops.triton import moe, quantize

    gate_up, _ = made(2 * width, 256, 128, 128, 3)
    down, _ = made(64, width, 128, 128, 3)
    experts = torch.rand(13, 3).argsort(1)[:, :2].int().contiguous()
    order, groups = moe.sort_pairs(experts, 0, 3, 128)
    args = (quantize(torch.randn(13, 256).half(), 128), gate_up, order, groups, 2)
    tiles = moe.Tiles(128, 256, 128, 8, 3, True)
    found = moe.grouped_product(*args, tiles, True, then=down)
    expected = quantize(moe.grouped_product(*args, tiles, True), 128)
    assert isinstance(found, RoundedRows)
    assert torch.equal(found.numbers.float(), expected.numbers.float())  # those after the last too
    assert torch.equal(found.scales[:26], expected.scales[:26])
    narrow = moe.grouped_product(*args, moe.Tiles(64, 128, 128, 4, 3), True, then=down)
    assert isinstance(narrow, torch.Tensor)


@interpreted
@pytest.mark.parametrize("columns", [0, 128])
def test_experts_of_16_bits_are_rounded(columns: int) -> None:
    """Near the truth, as far as rounding both inputs allows."""
    from gllm_engine.ops import triton

    gate_up, _ = made(128, 256, 128 if columns else 1, columns or 256, 4)
    down, _ = made(256, 64, 128 if columns else 1, columns or 64, 4, seed=1)
    x = torch.randn(9, 256).half()
    routing = torch.rand(9, 2), torch.rand(9, 4).argsort(1)[:, :2].int().contiguous()
    expected = reference.sum_experts(x.double(), *routing, gate_up, down, 0, 4)
    found = triton.sum_experts(x, *routing, gate_up, down, 0, 4)
    near(found, expected, 0.15)  # the interpreter rounds towards zero
    assert (found.double() - expected).norm() > 0.005 * expected.norm()


@interpreted
@pytest.mark.parametrize("name", WEIGHTS)
def test_one_row_is_not_rounded(name: str) -> None:
    from gllm_engine.ops import triton

    weight, exact = made_weight(name)
    depth = weight.shape[1]
    x = torch.randn(1, depth).half()
    assert triton.is_single(x, weight) and not triton.is_single(x.float(), weight)
    check_product(triton.gemv, x, weight, exact, 1e-3)
    gain = torch.rand(depth).half() + 0.5
    normed = reference.linear(x.double(), exact, None, (gain.double(), 0.1))
    near(triton.gemv(x, weight, norm=(gain, 0.1)), normed, 1e-3)
    x[0, 7] = torch.nan
    assert triton.gemv(x, weight).isnan().all()


@interpreted
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [2, 33])
def test_tiles_of_few_rows(rows: int, name: str) -> None:
    from gllm_engine.ops import triton

    weight, exact = made_weight(name)
    x = some_float8(rows, weight.shape[1], torch.float16)
    assert triton.has_tiles(x, weight) and not triton.has_tiles(x.float(), weight)
    check_product(triton.skinny, x, weight, exact, 1e-3)


@interpreted
@pytest.mark.parametrize(
    ("rows", "name"), [(64, "rows"), (65, "blocks, a part"), (65, "rows"), (300, "rows")]
)
def test_tiles_of_many_rows(rows: int, name: str) -> None:
    from gllm_engine.ops import triton

    weight, exact = made_weight(name)
    x = some_float8(rows, weight.shape[1], torch.float16)
    near(triton.skinny(x, weight), x.double() @ exact.T, 1e-3)
    if rows < 100:  # the interpreter is slow
        gated = reference.gated_linear(x.double(), exact, None, None)
        near(triton.skinny(x, weight, gated=True), gated, 3e-3)


@interpreted
@pytest.mark.parametrize("name", ["rows, odd", "ragged blocks", "blocks, a part"])
@pytest.mark.parametrize("rows", [3, 35])
def test_tiles_that_programs_share(rows: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are shorter, or have nothing to do; nothing is left over from the first time."""
    tiles = import_module("gllm_engine.ops.triton.skinny")
    monkeypatch.setattr(tiles, "_TILE_ROWS", 16)
    weight, exact = made_weight(name)
    x = some_float8(rows, weight.shape[1], torch.float16)
    for parts in (2, 4, 4):
        shared = partial(tiles.skinny, tiling=tiles.Tiling(16, 32, parts, 3))
        near(shared(x, weight), x.double() @ exact.T, 1e-3)
    if len(exact) % 2 == 0:
        gated = reference.gated_linear(x.double(), exact, None, None)
        near(shared(x, weight, gated=True), gated, 3e-3)


@interpreted
def test_tilings() -> None:
    """An iteration does not go beyond a scale's columns; programs that share tiles run at once."""
    from gllm_engine.ops.triton.skinny import choose_fp8_tiling

    for rows, columns in product((2, 16, 33, 64, 65, 300, 4096), (0, 32, 64, 128, 512)):
        for gated, depth in product((False, True), (64, 896, 4096, 14336)):
            for width in (64, 2560, 4096, 6144, 14336, 128256):
                n, k, parts, stages, _ = choose_fp8_tiling(rows, width, depth, gated, columns)
                assert not columns or columns % k == 0 and k <= 128
                m = min(max(16, 1 << (rows - 1).bit_length()), 128)
                assert 3 <= stages and stages * (n * (1 + gated) + m) * k <= 227 << 10
                assert parts == 1 or depth >= 512 * parts
                tiles = -(-width // n) * -(-rows // m)
                assert parts == 1 or tiles * parts <= 264
                assert tiles * parts >= 128 or depth < 1024 * parts


@pytest.fixture
def gpu_ops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The operations of a GPU, on the CPU, as on Hopper. torch's scaled product is a stand-in, and
    more rows than 4 are many.
    """
    from gllm_engine.ops import fp8_product

    def scaled_mm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, **more: Any) -> Tensor:
        """What torch demands on Hopper, and in float32 what it computes."""
        (rows, depth), width = a.shape, b.shape[1]
        assert a.dtype == b.dtype == FP8 and a.is_contiguous() and b.T.is_contiguous()
        assert not rows % 16 and not depth % 16 and not width % 16
        if scale_b.shape == (1, width):
            assert scale_a.shape == (rows, 1)
            assert scale_a.is_contiguous() and scale_b.is_contiguous()
            scale_a, scale_b = scale_a.expand(rows, depth), scale_b.expand(depth, width)
        else:
            assert scale_a.shape == (rows, depth // 128) and scale_a.stride() == (1, rows)
            assert scale_b.shape == (depth // 128, width // 128)
            assert scale_b.stride() == (1, depth // 128) and not depth % 512
            scale_a = scale_a.repeat_interleave(128, 1)
            scale_b = scale_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert more["out_dtype"] == BF16
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(BF16)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8_product, "_FEW_ROWS", 4)
    return without_flashinfer(monkeypatch)


def kernel_of(x: Tensor, weight: Fp8Weight) -> str:
    from gllm_engine.ops import fp8_product

    if own := fp8_product.own_product(x, weight):
        return own.__name__
    return "torch" if fp8_product.has_product(x, weight) else "dequantize"


@interpreted
@pytest.mark.parametrize(
    ("rows", "size", "kernel"),
    [
        (1, (48, 64, 1, 64), "gemv"),
        (4, (48, 64, 1, 64), "skinny"),
        (5, (48, 64, 1, 64), "torch"),
        (5, (20, 64, 1, 64), "skinny"),  # too narrow for the library
        (5, (48, 2048, 1, 2048), "torch"),
        (5, (128, 2048, 128, 128), "skinny"),  # too narrow for all multiprocessors
        (1, (128, 512, 128, 128), "gemv"),
        (4, (128, 512, 128, 128), "skinny"),
        (5, (128, 512, 128, 128), "torch"),
        (5, (128, 384, 128, 128), "skinny"),  # the library wants a multiple of 4 blocks
        (5, (200, 512, 128, 128), "skinny"),  # the last block is not whole
        (5, (48, 64, 16, 16), "dequantize"),
    ],
)
def test_products_of_a_gpu(
    rows: int, size: tuple[int, int, int, int], kernel: str, gpu_ops: ModuleType
) -> None:
    weight, _ = made(*size)
    width, depth = size[:2]
    x, gain = torch.randn(rows, depth).to(BF16), torch.rand(depth).to(BF16) + 0.5
    b = torch.randn(width).to(BF16)
    norm = (gain, 1e-5)
    assert kernel_of(x, weight) == kernel
    # The interpreter cuts numbers where a GPU rounds them.
    limit = 0.1 if kernel in ("skinny", "torch") else 0.02
    near(gpu_ops.linear(x, weight), reference.linear(x, weight), limit)
    out = torch.full((rows, width), torch.nan).to(BF16)
    assert gpu_ops.linear(x, weight, b, norm, out) is out
    near(out, reference.linear(x, weight, b, norm), limit)
    gated = reference.gated_linear(x, weight, b, norm)
    near(gpu_ops.gated_linear(x, weight, b, norm), gated, 2 * limit)
    total = torch.randn(rows, width).to(BF16)
    expected = reference.add_linear(total.clone(), x, weight, b)
    assert gpu_ops.add_linear(total, x, weight, b) is total
    near(total, expected, limit)
    assert gpu_ops.linear(x[:0], weight, b, norm).shape == (0, width)


@interpreted
@pytest.mark.parametrize(
    ("rows", "size", "rounds"),
    [
        (1, (48, 64, 1, 64), False),  # its product does not round
        (4, (48, 64, 1, 64), True),
        (5, (48, 64, 1, 64), True),
        (5, (128, 512, 128, 128), True),
        (5, (200, 512, 128, 128), True),
        (5, (48, 64, 16, 16), False),
        (0, (48, 64, 1, 64), False),
    ],
)
def test_activations_are_rounded_for_the_next_product(
    rows: int, size: tuple[int, int, int, int], rounds: bool, gpu_ops: ModuleType
) -> None:
    """With the same bits as if that product rounded them. A kernel that multiplies and activates
    does not round.
    """
    down, _ = made(*size)
    width, hidden = size[:2]
    gate_up, _ = made(2 * hidden, 64, 1, 64, seed=1)
    x = torch.randn(rows, 64).to(BF16)
    plain = gpu_ops.gated_linear(x, gate_up, None, None)
    found = gpu_ops.gated_linear(x, gate_up, None, None, down)
    assert isinstance(found, RoundedRows) == (rounds and kernel_of(x, gate_up) == "torch")
    assert found.shape == plain.shape == (rows, hidden)
    assert torch.equal(gpu_ops.linear(found, down), gpu_ops.linear(plain, down))
    total = torch.randn(rows, width).to(BF16)
    expected = gpu_ops.add_linear(total.clone(), plain, down, None)
    assert torch.equal(gpu_ops.add_linear(total, found, down, None), expected)
    both = torch.randn(rows, 2 * hidden).to(BF16)
    found = gpu_ops.activate(both, "gelu", True, down)
    assert isinstance(found, RoundedRows) == rounds
    expected = gpu_ops.linear(gpu_ops.activate(both, "gelu", True), down)
    assert torch.equal(gpu_ops.linear(found, down), expected)


@interpreted
@pytest.mark.parametrize(
    ("rows", "width", "depth", "kernel"),
    [
        (256, 4096, 14336, "skinny"),
        (257, 4096, 14336, "torch"),
        (128, 6144, 4096, "skinny"),
        (129, 6144, 4096, "torch"),
        (65, 28672, 4096, "torch"),
        (65, 4096, 1536, "torch"),
    ],
)
def test_tiles_that_would_leave_multiprocessors_idle(
    rows: int, width: int, depth: int, kernel: str, gpu_ops: ModuleType
) -> None:
    """Of weights with blocks, are divided along the depth by our kernel; torch divides others."""
    x = torch.empty(rows, depth, dtype=BF16)
    numbers = torch.empty(width, depth, dtype=FP8)
    scales = torch.empty(width // 128, depth // 128)
    assert kernel_of(x, Fp8Weight(numbers, scales, 128, 128)) == kernel
    assert kernel_of(x, Fp8Weight(numbers, torch.empty(width, 1), 1, depth)) == "torch"


@interpreted
def test_other_products(gpu_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of weights, other dtypes, other GPUs."""
    from gllm_engine.ops import fp8_product

    weight, _ = made(256, 512, 128, 128)
    x = torch.randn(5, 512).to(BF16)
    assert kernel_of(x, weight) == "torch"
    assert kernel_of(x, replace(weight, scale_row=torch.arange(256) // 128)) == "skinny"
    wide, _ = made(256, 576, 128, 128)
    part = replace(wide, numbers=wide.numbers[:, 64:].contiguous(), first_column=64)
    assert kernel_of(x, part) == "skinny"
    assert kernel_of(x.half(), weight) == "skinny"
    assert kernel_of(x.float(), weight) == kernel_of(x.float()[:1], weight) == "dequantize"
    near(gpu_ops.linear(x.float(), weight), reference.linear(x.float(), weight), 1e-5)
    monkeypatch.setattr(fp8_product, "on_hopper", lambda _: False)
    by_row, _ = made(256, 512, 1, 512)
    assert kernel_of(x[:1], weight) == kernel_of(x[:1], by_row) == "gemv"
    assert kernel_of(x, weight) == "dequantize" and kernel_of(x, by_row) == "torch"


@interpreted
def test_blocks_of_many_rows_are_hoppers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later GPUs overlap kernels, too, but have no products of warpgroups."""
    from gllm_engine.ops.triton import grouped

    monkeypatch.setattr(grouped, "OVERLAP", True)
    args = torch.zeros(1, 128, dtype=BF16), torch.zeros(1, 256, 128, dtype=BF16), 128
    assert grouped.takes_blocks(*args)
    monkeypatch.setattr(grouped, "on_hopper", lambda _: False)
    assert not grouped.takes_blocks(*args)


@interpreted
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_of_x_may_lie_apart(rows: int, normed: bool, gpu_ops: ModuleType) -> None:
    """Which costs no copy, nor another kernel if a norm runs first."""
    from gllm_engine.ops import triton

    x = torch.randn(rows, 96).half()[:, :64]
    together = x.contiguous()
    gain = torch.rand(64).half() + 0.5
    norm = (gain, 0.1) if normed else None
    assert torch.equal(triton.rms_norm(x, gain, 0.1), triton.rms_norm(together, gain, 0.1))
    found, expected = triton.quantize(x, 32, norm), triton.quantize(together, 32, norm)
    assert torch.equal(found.numbers.float(), expected.numbers.float())
    assert torch.equal(found.scales, expected.scales)
    by_row, _ = made(48, 64, 1, 64)
    for weight in (by_row, torch.randn(48, 64).half()):
        same = gpu_ops.linear(together, weight, None, norm)
        near(gpu_ops.linear(x, weight, None, norm), same, 1e-3)
    kernel = triton.gemv if rows == 1 else triton.skinny
    assert gpu_ops._own_product(together, weight, norm) is kernel
    assert gpu_ops._own_product(x, weight, norm) is (kernel if normed or rows == 1 else None)
