"""The kernels for experts of few tokens, against their twin."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from gllm_engine.ops import Fp8Weight, Weight, pack_codes, quantize_fp8, reference
from gllm_engine.ops.triton import few_experts, sum_experts
from gllm_engine.routing import Clamp

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"
)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DIM, HIDDEN = 160, 64
# Names of formats: FP8 by its blocks; 4-bit numbers by group and the dtype of scales.
FP8 = {"row": (1, 0), "block": (16, 64), "square": (128, 128), "tensor": (0, 0)}
PACKED: dict[str, tuple[int, torch.dtype]] = {
    "mxfp4": (32, torch.uint8),
    "int4": (32, torch.bfloat16),
    "gptq": (32, torch.float16),
    "wide": (32, torch.float32),
    "awq": (32, torch.float16),
}


def make_weight(kind: str, count: int, width: int, depth: int, group: int = 0) -> Weight:
    """Random matrices. `group`: of 4-bit numbers."""
    matrices = torch.randn(count, width, depth) / depth**0.5
    if kind == "plain":
        return matrices
    if kind in FP8:
        rows, columns = FP8[kind]
        numbers, scales = quantize_fp8(matrices, rows, columns)
        return Fp8Weight(numbers, scales, rows or width, columns or depth)
    least, dtype = PACKED[kind]
    group = group or least
    codes = torch.randint(0, 16, (count, width, depth), dtype=torch.uint8)
    size = (count, width, depth // group)
    zeros = torch.randint(0, 16, size, dtype=torch.uint8) if kind == "awq" else None
    if dtype == torch.uint8:
        return pack_codes(codes, torch.randint(118, 125, size, dtype=torch.uint8), True)
    return pack_codes(codes, (torch.rand(size) / 50).to(dtype), False, zeros)


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    """Some numbers would make a sum so small that it proves nothing."""
    torch.manual_seed(0)


def make_routing(
    tokens: int, top_k: int, experts: int, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights and experts, with `first` among those of token 0."""
    order = torch.rand(tokens, experts)
    order[0, first] = -1
    return torch.rand(tokens, top_k) + 0.1, order.argsort(1)[:, :top_k].int().contiguous()


def compare(x: torch.Tensor, routing: tuple[torch.Tensor, ...], *more: Any, **options: Any) -> None:
    """Both twins, added to a sum."""
    assert few_experts.takes_few(routing[1], *more[:2], more[3])
    total = torch.randn_like(x)
    expected = reference.sum_experts(x, *routing, *more, total.clone(), **options)
    assert (expected - total).std() > 0.01
    found = sum_experts(x, *routing, *more, total, **options)
    assert found is total
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("kind", ["plain", *FP8, *PACKED])
def test_formats(kind: str) -> None:
    """Two tokens, some of whose experts other ranks hold."""
    gate_up, down = make_weight(kind, 5, 2 * HIDDEN, DIM), make_weight(kind, 5, DIM, HIDDEN)
    compare(torch.randn(2, DIM), make_routing(2, 4, 16, 3), gate_up, down, 3, 16)


@interpreted
@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("gptq", 64), ("awq", 128)])
def test_groups_and_several_chunks(kind: str, group: int) -> None:
    """Rows of 4-bit numbers with more loads than a warp has threads."""
    gate_up = make_weight(kind, 2, 2 * 1280, 128, group)
    down = make_weight(kind, 2, 128, 1280, group)
    compare(torch.randn(1, 128), make_routing(1, 1, 2), gate_up, down, 0, 2)


@interpreted
def test_long_rows() -> None:
    """Rows with more loads than a program has threads."""
    gate_up, down = torch.randn(2, 2 * 1100, 24) / 4, torch.randn(2, 24, 1100) / 32
    compare(torch.randn(1, 24), make_routing(1, 1, 2), gate_up, down, 0, 2)


@interpreted
@pytest.mark.parametrize("kind", ["plain", "mxfp4"])
@pytest.mark.parametrize("on_input", [False, True])
def test_biases_clamp_and_weights_of_the_input(kind: str, on_input: bool) -> None:
    gate_up, down = make_weight(kind, 4, 2 * HIDDEN, DIM), make_weight(kind, 4, DIM, HIDDEN)
    biases = torch.randn(4, 2 * HIDDEN), torch.randn(4, DIM)
    options = {"on_input": on_input, "biases": biases, "clamp": Clamp(1.5, 1.702)}
    x, routing = torch.randn(2, DIM), make_routing(2, 3, 12, 2)
    compare(x, routing, gate_up, down, 2, 12, **options)
    plain = reference.sum_experts(x, *routing, gate_up, down, 2, 12)
    found = sum_experts(x, *routing, gate_up, down, 2, 12, **options)
    assert (found - plain).abs().max() > 0.1


@interpreted
def test_parts_of_blocks() -> None:
    """Weights that a split has cut within blocks: by their columns, and by their rows."""
    whole = make_weight("block", 3, DIM, HIDDEN + 32)
    assert isinstance(whole, Fp8Weight)
    down = replace(whole, numbers=whole.numbers[..., 32:].contiguous(), first_column=32)
    gate_up = make_weight("block", 3, 2 * HIDDEN, DIM)
    assert isinstance(gate_up, Fp8Weight)
    rows = torch.randint(0, gate_up.scales.shape[1], (2 * HIDDEN,))
    gate_up = replace(gate_up, scale_row=rows)
    compare(torch.randn(1, DIM), make_routing(1, 2, 3), gate_up, down, 0, 3)


def test_what_is_left_to_tiles() -> None:
    """Many pairs, loads with several scales, rows that registers do not hold."""
    gate_up, down = torch.empty(16, 64, 32), torch.empty(16, 32, 32)

    def takes(tokens: int, top_k: int, gate_up: Weight, down: Weight) -> bool:
        experts = torch.empty(tokens, top_k, dtype=torch.int32)
        return few_experts.takes_few(experts, gate_up, down, 16)

    assert takes(1, 8, gate_up, down) and takes(4, 2, gate_up, down)
    assert not takes(5, 2, gate_up, down)
    numbers = torch.empty(16, 32, 32, dtype=torch.float8_e4m3fn)
    scales = torch.empty(16, 32, 3)
    assert not takes(1, 2, gate_up, Fp8Weight(numbers, scales, 1, 16, first_column=4))
    assert takes(1, 2, gate_up, Fp8Weight(numbers, scales, 1, 16, first_column=8))
    wide = torch.empty(16, 32, 16000)
    assert not takes(1, 2, gate_up, wide) and takes(1, 1, gate_up, wide)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.bfloat16) for kind in ("plain", *FP8, *PACKED)]
    + [(kind, torch.float16) for kind in ("block", "mxfp4", "gptq", "awq")],
)
def test_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    """Few tokens and many, in the same formats, in a graph that is replayed with other experts."""
    with torch.device("cuda"):
        gate_up = make_weight(kind, 16, 2 * 352, 2880)
        dim = gate_up.shape[-1]
        down = make_weight(kind, 16, dim, 352)
        exact = gate_up, down
        if isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor):
            gate_up, down = gate_up.to(dtype), down.to(dtype)
            exact = gate_up.double(), down.double()
        for tokens in (1, 2, 20, 700):
            x, out = torch.randn(2, tokens, dim).to(dtype)
            weights, experts = make_routing(tokens, 4, 16)
            args = (x, weights, experts, gate_up, down, 0, 16)
            sum_experts(*args)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out.copy_(sum_experts(*args))
            for _ in range(2):
                experts.copy_(make_routing(tokens, 4, 16)[1])
                graph.replay()
                right = reference.sum_experts(x.double(), weights, experts, *exact, 0, 16)
                limit = 0.06 if kind in FP8 and tokens > 2 else 0.02  # x is rounded to float8
                assert (out - right).norm() < limit * right.norm()
