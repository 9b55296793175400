"""Weights of 4-bit numbers: their values, and the kernel for experts against its twin."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from gllm_engine.ops import (
    PackedWeight,
    Weight,
    pack,
    pack_codes,
    quantize_int4,
    quantize_mxfp4,
    reference,
)
from gllm_engine.routing import Clamp

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"
)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def every_byte(rows: int, depth: int, is_float: bool, group: int, count: int) -> PackedWeight:
    """Random bytes; scales that differ much."""
    numbers = torch.randint(0, 256, (count, rows, depth // 2), dtype=torch.uint8)
    size = (count, rows, depth // group)
    if is_float:
        return pack(numbers, torch.randint(118, 128, size, dtype=torch.uint8), True)
    return pack(numbers, torch.rand(size).bfloat16() / 8, False)


def test_every_code_and_every_exponent() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.tensor(
        [0, 1, 2, 100, 120, 126, 127, 128, 129, 140, 180, 200, 240, 250, 251, 252]
    )
    weight = pack(numbers, scales.to(torch.uint8)[:, None], True)
    found = weight.dequantized(torch.float64)
    for row in range(16):
        for j in range(32):
            code = row if j % 2 else j // 2
            assert found[row, j] == E2M1[code] * 2.0 ** (int(scales[row]) - 127)
    whole = pack(numbers, torch.full((16, 1), 0.5).half(), False).dequantized(torch.float32)
    assert whole[3, :4].tolist() == [-4.0, -2.5, -3.5, -2.5]


def with_zeros(rows: int, depth: int, group: int, count: int) -> PackedWeight:
    """Any codes and zero points; scales that differ much."""
    codes = torch.randint(0, 16, (count, rows, depth), dtype=torch.uint8)
    size = (count, rows, depth // group)
    zeros = torch.randint(0, 16, size, dtype=torch.uint8)
    return pack_codes(codes, torch.rand(size).half() / 8, False, zeros)


def test_zero_points() -> None:
    codes = torch.randint(0, 16, (2, 24, 192), dtype=torch.uint8)
    scales = torch.randn(2, 24, 3)
    zeros = torch.randint(0, 16, (2, 24, 3), dtype=torch.uint8)
    for dtype in (torch.float16, torch.bfloat16):
        weight = pack_codes(codes, scales.to(dtype), False, zeros)
        assert weight.group == 64 and weight.shape == codes.shape
        found = weight.dequantized(torch.float64)
        for row in range(24):
            for column in range(192):
                group = column // 64
                number = int(codes[1, row, column]) - int(zeros[1, row, group])
                assert found[1, row, column] == number * scales[1, row, group].to(dtype).item()
        part = weight[1].rows(slice(3, 7))
        assert torch.equal(part.dequantized(torch.float64), found[1, 3:7])


def test_rounding_to_four_bits() -> None:
    matrix = torch.randn(2, 24, 128)
    for group in (32, 64):
        weight = pack(*quantize_int4(matrix, group), False)
        assert weight.shape == matrix.shape and weight.group == group
        largest = matrix.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True)
        error = (weight.dequantized(torch.float32) - matrix).unflatten(-1, (-1, group)).abs()
        assert (error <= largest / 13.5).all()
    weight = pack(*quantize_mxfp4(matrix), True)
    largest = matrix.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    error = (weight.dequantized(torch.float32) - matrix).unflatten(-1, (-1, 32)).abs()
    assert (error <= largest / 4 + 1e-6).all()
    again = quantize_mxfp4(weight.dequantized(torch.float32))
    assert torch.equal(
        pack(*again, True).dequantized(torch.float32), weight.dequantized(torch.float32)
    )


# Depths that no tile divides.
@interpreted
@pytest.mark.parametrize(
    ("is_float", "group", "tokens", "held"),
    [(True, 32, 1, (0, 6)), (True, 32, 20, (1, 3)), (False, 32, 9, (0, 6)), (False, 64, 3, (2, 4))],
)
def test_experts(is_float: bool, group: int, tokens: int, held: tuple[int, int]) -> None:
    dim = 3 * group
    gate_up = every_byte(128, dim, is_float, group, held[1])
    check_experts(gate_up, every_byte(dim, 64, is_float, group, held[1]), tokens, held)


@interpreted
@pytest.mark.parametrize("group", [32, 64])
def test_experts_with_zero_points(group: int) -> None:
    dim = 5 * group
    held = (1, 3)
    check_experts(with_zeros(128, dim, group, 3), with_zeros(dim, 64, group, 3), 9, held)


@interpreted
@pytest.mark.parametrize("is_first", [False, True])
def test_tiles_of_experts_that_are_packed_in_part(
    is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of plain matrices would need more shared memory than there is."""
    from gllm_engine.ops.triton import moe

    gate_up = pack(*quantize_int4(torch.randn(2, 64, 256), 128), False)
    down = pack(*quantize_int4(torch.randn(2, 256, 32), 32), False)
    found = []

    def product(x: torch.Tensor, matrix: Weight, order: torch.Tensor, *more: Any) -> torch.Tensor:
        found.append(more[2])
        return x.new_zeros(len(order), 32 if len(more) > 3 else 256)

    monkeypatch.setattr(moe, "grouped_product", lambda *args, bias=None: product(*args))
    # Only the tiles matter here; the interpreter takes seconds to sort and to sum 2,000 rows.
    monkeypatch.setattr(moe, "sort_pairs", lambda experts, *_: (experts.flatten(), None))
    monkeypatch.setattr(moe, "_sum", MagicMock())
    for tokens in (2, 200, 2000):
        experts = torch.randint(0, 2, (tokens, 1), dtype=torch.int32)
        weights = torch.rand(tokens, 1)
        stacks = (gate_up, torch.randn(2, 256, 32)) if is_first else (torch.randn(2, 64, 256), down)
        moe.sum_experts(torch.randn(tokens, 256).half(), weights, experts, *stacks, 0, 2)
    packed_tiles = [tiles for _, tiles in moe._PACKED_TILES]
    assert len(found) == 6 and all(tiles in packed_tiles for tiles in found)
    assert (found[-1].rows < 128) == is_first  # a turn of gate_up has two runs


def check_experts(
    gate_up: PackedWeight, down: PackedWeight, tokens: int, held: tuple[int, int]
) -> None:
    from gllm_engine.ops import triton

    first, _ = held
    dim = gate_up.shape[-1]
    x = torch.randn(tokens, dim) / 16
    routing = torch.rand(tokens, 2), torch.rand(tokens, 6).argsort(1)[:, :2].int().contiguous()
    args = (x, *routing, gate_up, down, first, 6)
    expected = reference.sum_experts(*args)
    assert expected.std() > 0.01
    torch.testing.assert_close(triton.sum_experts(*args), expected, rtol=0, atol=1e-4)


def random_weight(rows: int, depth: int, kind: torch.dtype, group: int) -> PackedWeight:
    """Random bytes; `kind`: of the scales."""
    numbers = torch.randint(0, 256, (rows, depth // 2), dtype=torch.uint8)
    size = (rows, depth // group)
    if kind == torch.uint8:
        return pack(numbers, torch.randint(118, 128, size, dtype=torch.uint8), True)
    return pack(numbers, (torch.rand(size) / 8).to(kind), False)


# Formats, with depths that no run and no turn divides.
WEIGHTS = [
    (torch.uint8, 32, 96),
    (torch.uint8, 32, 416),
    (torch.bfloat16, 32, 160),
    (torch.bfloat16, 128, 384),
    (torch.float16, 64, 192),
    (torch.float32, 128, 128),
    (torch.bfloat16, 384, 384),
]


@interpreted
@pytest.mark.parametrize(("kind", "group", "depth"), WEIGHTS)
def test_dequantized(kind: torch.dtype, group: int, depth: int) -> None:
    from gllm_engine.ops import triton

    weight = random_weight(50, depth, kind, group)
    for dtype in (torch.float32, torch.float16):
        found = triton.dequantize_packed(weight, dtype)
        assert torch.equal(found, weight.dequantized(dtype))
    found = triton.dequantize_packed(weight, torch.bfloat16)  # the interpreter cuts off bits
    torch.testing.assert_close(found, weight.dequantized(torch.bfloat16), rtol=2**-7, atol=0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "group", "depth"), WEIGHTS)
def test_products(kind: torch.dtype, group: int, depth: int, dtype: torch.dtype) -> None:
    """One row with a norm; several with a bias, added to a sum; more than a tile, gated.

    The interpreter has no products of bfloat16; test_on_a_gpu has them.
    """
    from gllm_engine.ops import triton

    weight = random_weight(2 * 40, depth, kind, group)
    bias = torch.randn(80).to(dtype)
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2}[dtype]

    def compare(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert expected.float().std() > 0.1
        torch.testing.assert_close(found, expected, rtol=tolerance / 4, atol=tolerance)

    x = torch.randn(33, depth).to(dtype) / 8
    norm = torch.rand(depth).to(dtype), 1e-6
    expected = reference.linear(x[:1], weight, None, norm)
    compare(triton.packed_linear(x[:1], weight, norm=norm), expected)
    total = torch.randn(8, 80).to(dtype)
    expected = reference.add_linear(total.clone(), x[:8], weight, bias)
    found = triton.packed_linear(x[:8], weight, bias, out=total, add=True)
    assert found is total
    compare(found, expected)
    compare(
        triton.packed_linear(x, weight, bias, gated=True),
        reference.gated_linear(x, weight, bias, None),
    )


@interpreted
@pytest.mark.parametrize(("group", "depth"), [(32, 160), (64, 192), (128, 384)])
def test_products_with_zero_points(group: int, depth: int) -> None:
    from gllm_engine.ops import triton

    weight = with_zeros(80, depth, group, 1)[0]
    x = torch.randn(9, depth) / 8
    assert torch.equal(triton.dequantize_packed(weight, x.dtype), weight.dequantized(x.dtype))
    for rows in (1, 9):
        expected = reference.gated_linear(x[:rows], weight, None, None)
        assert expected.std() > 0.1
        found = triton.packed_linear(x[:rows], weight, gated=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_in_parts(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    from gllm_engine.ops import triton
    from gllm_engine.ops.triton import packed

    weight = random_weight(64, 1100 // 32 * 32, torch.uint8, 32)
    x = torch.randn(3, weight.depth) / 16
    monkeypatch.setattr(packed, "_MIN_TURNS", 1)
    parts = packed.num_parts(2, packed._PROGRAMS, weight.depth, packed.RUN)
    assert parts == 8  # of which the last ones are empty
    expected = (reference.gated_linear if gated else reference.linear)(x, weight, None, None)
    for _ in range(2):  # the counters are zero again
        found = triton.packed_linear(x, weight, gated=gated)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@interpreted
def test_experts_with_all_options() -> None:
    """Biases, a clamp, weights that multiply the input, in tiles of other sizes."""
    from gllm_engine.ops import triton

    gate_up = every_byte(2 * 64, 416, True, 32, 4)
    down = every_byte(416, 64, True, 32, 4)
    biases = torch.randn(4, 128), torch.randn(4, 416)
    for dtype, tokens in ((torch.float32, 33), (torch.float16, 40)):
        x = torch.randn(tokens, 416).to(dtype) / 16
        routing = torch.rand(tokens, 2), torch.rand(tokens, 4).argsort(1)[:, :2].int().contiguous()
        args = (x, *routing, gate_up, down, 0, 4, None, True)
        typed = (biases[0].to(dtype), biases[1].to(dtype))
        options = (typed, Clamp(7.0, 1.702))
        expected = reference.sum_experts(*args, *options)
        size = expected.float().std().item()
        assert size > 0.1
        tolerance = size * (1e-5 if dtype == torch.float32 else 0.02)
        found = triton.sum_experts(*args, *options)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.uint8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "depth"), [(32, 2880), (64, 2048), (128, 1408)])
def test_on_a_gpu(kind: torch.dtype, group: int, depth: int) -> None:
    """Dense products of all tiles, and experts, in bfloat16."""
    from gllm_engine.ops import flashinfer

    if kind == torch.uint8 and group != 32:
        return
    with torch.device("cuda"):
        stack = every_byte(2 * 200, depth, True, 32, 4)
        if kind != torch.uint8:
            numbers = torch.randint(0, 256, (4, 400, depth // 2), dtype=torch.uint8)
            stack = pack(numbers, (torch.rand(4, 400, depth // group) / 8).to(kind), False)
        bias = torch.randn(400).bfloat16()
        for rows in (1, 8, 33, 65, 300, 700):
            x = torch.randn(rows, depth).bfloat16() / 16
            for dense, more in (
                (flashinfer.linear, (bias,)),
                (flashinfer.gated_linear, (bias, None)),
            ):
                found = dense(x, stack[1], *more).float()
                right = getattr(reference, dense.__name__)(
                    x.double(), stack[1], bias.double(), *more[1:]
                )
                assert (found - right).norm() < 0.02 * right.norm()
        check_experts_on_a_gpu(
            every_byte(448, depth, True, 32, 4), every_byte(depth, 224, True, 32, 4)
        )


def check_experts_on_a_gpu(gate_up: PackedWeight, down: PackedWeight) -> None:
    """Of four experts, in tiles of all sizes."""
    from gllm_engine.ops import flashinfer

    for tokens in (1, 9, 40, 130, 900):
        x = torch.randn(tokens, down.shape[1]).bfloat16() / 16
        experts = torch.rand(tokens, 4).argsort(1)[:, :2].int().contiguous()
        args = (torch.rand(tokens, 2), experts, gate_up, down, 0, 4)
        right = reference.sum_experts(x.double(), *args)
        found = flashinfer.sum_experts(x, *args).float()
        assert (found - right).norm() < 0.02 * right.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "depth"), [(32, 2880), (128, 2048)])
def test_zero_points_on_a_gpu(group: int, depth: int) -> None:
    """As AWQ and GPTQ have them, with scales in float16, beside activations in bfloat16."""
    from gllm_engine.ops import flashinfer

    with torch.device("cuda"):
        stack = with_zeros(448, depth, group, 4)
        for rows in (1, 8, 33, 65, 300, 700):
            x = torch.randn(rows, depth).bfloat16() / 16
            right = reference.linear(x.double(), stack[1])
            assert (flashinfer.linear(x, stack[1]) - right).norm() < 0.02 * right.norm()
            right = reference.gated_linear(x.double(), stack[1], None, None)
            found = flashinfer.gated_linear(x, stack[1], None, None)
            assert (found - right).norm() < 0.02 * right.norm()
        check_experts_on_a_gpu(stack, with_zeros(depth, 224, 32, 4))
