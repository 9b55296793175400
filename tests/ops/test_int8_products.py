"""int8 weights: the slow twin, and a GPU's products against it in Triton's interpreter."""

from __future__ import annotations

import os
from importlib import import_module

import pytest
import torch
from torch import Tensor

from gllm_engine.ops import Int8Weight, quantize_int8, reference

BF16 = torch.bfloat16
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"
)


def near(out: Tensor, expected: Tensor, limit: float) -> None:
    out, expected = out.double(), expected.double()
    assert out.shape == expected.shape and out.isfinite().all()
    assert (out - expected).norm() <= limit * expected.norm()


def made(width: int, depth: int) -> Int8Weight:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-128, 128, (width, depth), generator=generator).to(torch.int8)
    return Int8Weight(numbers, torch.rand(width, 1, generator=generator) / depth**0.5 / 30 + 1e-5)


def test_twin() -> None:
    weight = made(24, 40)
    exact = weight.numbers.float() * weight.scales
    x = torch.randn(3, 40)
    assert torch.equal(weight.dequantized(BF16), exact.to(BF16))
    assert torch.equal(reference.linear(x, weight), x @ exact.T)
    stack = Int8Weight(weight.numbers.unflatten(0, (3, 8)), weight.scales.unflatten(0, (3, 8)))
    assert len(stack) == 3 and stack.shape == (3, 8, 40)
    assert torch.equal(stack[1].dequantized(torch.float32), exact[8:16])
    assert torch.equal(stack.rows(slice(2, 5))[1].dequantized(torch.float32), exact[10:13])


@pytest.mark.parametrize("rows", [0, 1])
def test_quantizing(rows: int) -> None:
    matrix = torch.randn(40, 70)
    matrix[7] *= 1e-3
    numbers, scales = quantize_int8(matrix, rows)
    assert scales.shape == ((40, 1) if rows else (1, 1))
    assert numbers.abs().amax(1).tolist() == [127] * 40 if rows else numbers.abs().amax() == 127
    assert ((numbers * scales - matrix).abs() <= 0.501 * scales).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("count", [2, 32, 49])
def test_rows_in_int8(count: int, dtype: torch.dtype) -> None:
    from gllm_engine.ops import triton

    x = torch.randn(count, 200).to(dtype)
    x[0] = 0
    rounded = triton.quantize(x, dtype=torch.int8)
    numbers, scales = rounded.numbers, rounded.scales.flatten()
    padded = max(32, -(-count // 16) * 16)
    assert numbers.shape == (padded, 200) and scales.shape == (padded,)
    assert not numbers[count:].any() and not numbers[0].any() and scales.isfinite().all()
    assert (numbers[1:count].abs().amax(1) == 127).all()
    back = numbers[:count].float() * scales[:count, None]
    assert ((back - x.float()).abs() <= 0.501 * scales[:count, None]).all()


PRODUCTS = [(1, 64, 48), (2, 64, 48), (17, 200, 72), (40, 64, 16), (5, 60, 48), (5, 64, 30)]


@interpreted
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("count", "depth", "width"), PRODUCTS)
def test_products(count: int, depth: int, width: int, bias: bool) -> None:
    """Some rows are rounded, if torch has a product for the sizes: by up to 1 of 254 a number."""
    product = import_module("gllm_engine.ops.int8_product")
    weight = made(width, depth)
    x, total = torch.randn(count, depth).to(BF16), torch.randn(count, width).to(BF16)
    b = torch.randn(width).to(BF16) if bias else None
    norm = (torch.rand(depth).to(BF16) + 0.5, 1e-5)
    assert product.has_product(x, weight) == (not depth % 8 and not width % 8)
    limit = 0.008 if count == 1 else 0.015
    wide = x.float(), weight, None if b is None else b.float()
    near(product.linear(x, weight, b), reference.linear(*wide), limit)
    out = torch.full((count, width), torch.nan, dtype=BF16)
    assert product.linear(x, weight, b, norm, out) is out
    wide_norm = norm[0].float(), norm[1]
    near(out, reference.linear(*wide, wide_norm), limit)
    apart = torch.full((count, 2 * width), torch.nan, dtype=BF16)[:, :width]
    assert product.linear(x, weight, b, norm, apart) is apart
    assert torch.equal(apart, out)
    expected = reference.add_linear(total.float(), *wide)
    assert product.add_linear(total, x, weight, b) is total
    near(total, expected, limit)
    gated = product.gated_linear(x, weight, b, norm)
    assert (gated is None) == (count > 1)
    if gated is not None:
        near(gated, reference.gated_linear(*wide, wide_norm), 3 * limit)


@interpreted
def test_products_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, each with the bits of one product; the last one is small."""
    product = import_module("gllm_engine.ops.int8_product")
    x, weight = torch.randn(75, 64).to(BF16), made(48, 64)
    whole = product.linear(x, weight)
    for some in (32, 64):
        monkeypatch.setattr(product, "INT8_ROWS_AT_ONCE", some)
        assert torch.equal(product.linear(x, weight), whole)
    assert product.linear(x[:0], weight).shape == (0, 48)


@interpreted
def test_exact_where_nothing_is_rounded() -> None:
    product = import_module("gllm_engine.ops.int8_product")
    weight = made(48, 64)
    x = torch.randint(-127, 128, (20, 64)).float()
    x[:, 0] = 127
    found = product.linear(x.to(torch.float16), weight)
    torch.testing.assert_close(found.float(), reference.linear(x, weight), rtol=2e-3, atol=2e-3)


@interpreted
def test_rows_that_are_not_numbers_stay_so() -> None:
    product = import_module("gllm_engine.ops.int8_product")
    x = torch.randn(20, 64).to(BF16)
    x[3, 7] = torch.nan
    y = product.linear(x, made(48, 64))
    assert y[3].isnan().all() and y[4:].isfinite().all()
