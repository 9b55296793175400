"""Weights of 4-bit numbers: their values, and the kernel for experts against its twin."""

from __future__ import annotations

import os

import pytest
import torch

from gllm_engine.ops import PackedWeight, pack, pack_codes, quantize_int4, quantize_mxfp4, reference

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


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


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"
)


# Depths that no tile divides.
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@interpreted
@pytest.mark.parametrize(
    ("is_float", "group", "tokens", "held"),
    [(True, 32, 1, (0, 6)), (True, 32, 20, (1, 3)), (False, 32, 9, (0, 6)), (False, 64, 3, (2, 4))],
)
def test_experts(is_float: bool, group: int, tokens: int, held: tuple[int, int]) -> None:
    dim = 3 * group
    gate_up = every_byte(128, dim, is_float, group, held[1])
    check_experts(gate_up, every_byte(dim, 64, is_float, group, held[1]), tokens, held)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@interpreted
@pytest.mark.parametrize("group", [32, 64])
def test_experts_with_zero_points(group: int) -> None:
    dim = 5 * group
    held = (1, 3)
    check_experts(with_zeros(128, dim, group, 3), with_zeros(dim, 64, group, 3), 9, held)


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
