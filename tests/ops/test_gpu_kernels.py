"""Every kernel against its slow twin, on fresh random inputs, with outputs that begin as NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_reference import make_case
from torch import Tensor

from gllm_engine.attention_shape import AttentionShape
from gllm_engine.ops import (
    AttentionInputs,
    Batch,
    Fp8Weight,
    HeadNorm,
    Int8Weight,
    PlainSampling,
    RoundedRows,
    Segments,
    reference,
    select_ops,
)
from gllm_engine.routing import Clamp, Routing

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FLOAT8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """New numbers in every run, and NaN in the memory that empty tensors will get."""
    torch.seed()
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 27):
        torch.full((size // 4,), float("nan"), device=CUDA)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=CUDA).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (7, 96), (33, 4096), (3, 5120)])
def test_norms_and_activation(rows: int, dim: int, dtype: torch.dtype) -> None:
    ops, limit = select_ops(CUDA), TOLERANCE[dtype]
    x, residual = randn(rows, dim, dtype=dtype), randn(rows, dim, dtype=dtype)
    weight, wide = randn(dim, dtype=dtype), randn(rows, 2 * dim, dtype=dtype)
    expected = reference.rms_norm(x.cpu(), weight.cpu(), 1e-5)
    near(ops.rms_norm(x, weight, 1e-5), expected, limit)
    total = residual.clone()
    assert ops.rms_norm(x, weight, 1e-5, add_to=total) is total
    near(total, residual.cpu() + expected, limit)
    expected = reference.activate(wide.cpu(), "silu", gated=True)
    near(ops.activate(wide, "silu", gated=True), expected, limit)
    for name, args in (("rms_norm", ()), ("layer_norm", (None,))):
        norm = getattr(ops, name)
        total = x.clone()
        found = norm(total, weight, *args, 1e-5, add_after=weight)
        near(found, norm(x, weight, *args, 1e-5), limit)
        assert torch.equal(total, x + weight)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "width"),
    [
        *[(1, 64, 24), (1, 4096, 6144), (1, 14336, 4096), (1, 5120, 1280), (1, 2501, 1002)],
        *[(5, 160, 50), (2, 4096, 6144), (33, 6400, 5120), (64, 14336, 4096), (65, 4096, 4096)],
    ],
)
def test_linear_and_what_rides_along(
    rows: int, depth: int, width: int, bias: bool, dtype: torch.dtype
) -> None:
    ops, limit = select_ops(CUDA), TOLERANCE[dtype]
    x, total, gain = (randn(*s, dtype=dtype) for s in ((rows, depth), (rows, width), (depth,)))
    weight = (randn(width, depth, dtype=torch.float32) / depth**0.5).to(dtype)
    b = randn(width, dtype=dtype) if bias else None
    wide = [None if t is None else t.double().cpu() for t in (x, weight, b, total, gain)]
    x64, weight64, b64, total64, gain64 = wide
    norm, norm64 = (gain, 1e-5), (gain64, 1e-5)
    near(ops.linear(x, weight, b), reference.linear(x64, weight64, b64), limit)
    near(ops.linear(x, weight, b, norm), reference.linear(x64, weight64, b64, norm64), limit)
    gated = reference.gated_linear(x64, weight64, b64, norm64)
    near(ops.gated_linear(x, weight, b, norm), gated, 3 * limit)
    expected = reference.add_linear(total64, x64, weight64, b64)
    assert ops.add_linear(total, x, weight, b) is total
    near(total, expected, limit)
    out = torch.full((rows, width), torch.nan, dtype=dtype, device=CUDA)
    assert ops.linear(x, weight, b, norm, out) is out
    near(out, reference.linear(x64, weight64, b64, norm64), limit)


def made_fp8(block: tuple[int, int] | None, *shape: int) -> Fp8Weight:
    """A weight with a scale per block, or per row; or a part, which does not begin with a block, of
    one with blocks of 128. On the GPU.
    """
    *lead, width, depth = shape
    rows, columns = block or (128, 128)
    columns = columns or depth
    numbers = (randn(*shape, dtype=torch.float32) * 60).clamp(-448, 448).to(FLOAT8)
    first = 0 if block else 64
    size = (*lead, -(-width // rows), -(-(first + depth) // columns))
    scales = torch.rand(size, device=CUDA) / depth**0.5 / 30 + 1e-5
    index = None if block else torch.randint(0, size[-2], (width,), device=CUDA)
    return Fp8Weight(numbers, scales, rows, columns, index, first)


def on_cpu(weight: Fp8Weight) -> torch.Tensor:
    """The exact numbers of a weight, in float64."""
    moved = {
        name: None if part is None else part.cpu()
        for name, part in (("scales", weight.scales), ("scale_row", weight.scale_row))
    }
    return replace(weight, numbers=weight.numbers.cpu(), **moved).dequantized(torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [(1, 0), (128, 128), None])
@pytest.mark.parametrize(
    ("rows", "depth", "width", "dtype"),
    [
        (1, 4096, 6144, torch.bfloat16),
        (1, 896, 256, torch.float16),
        (1, 1001, 70, torch.bfloat16),
        (2, 1001, 70, torch.float16),
        (7, 1792, 4096, torch.bfloat16),
        (33, 896, 1152, torch.bfloat16),
        (64, 14336, 4096, torch.bfloat16),
        (65, 1792, 4096, torch.bfloat16),
        (300, 896, 576, torch.float16),
        (300, 4096, 14336, torch.bfloat16),
    ],
)
def test_linear_of_fp8_weights(
    rows: int,
    depth: int,
    width: int,
    dtype: torch.dtype,
    block: tuple[int, int] | None,
    bias: bool,
) -> None:
    """Several rows of x are rounded too: by up to a sixteenth a number, so by some 3% of the
    result. One row is not.
    """
    ops, limit = select_ops(CUDA), TOLERANCE[torch.bfloat16] if rows == 1 else 0.05
    x, total, gain = (randn(*s, dtype=dtype) for s in ((rows, depth), (rows, width), (depth,)))
    weight = made_fp8(block, width, depth)
    b = randn(width, dtype=dtype) if bias else None
    x64, b64, total64, gain64 = (
        None if t is None else t.double().cpu() for t in (x, b, total, gain)
    )
    exact, norm, norm64 = on_cpu(weight), (gain, 1e-5), (gain64, 1e-5)
    near(ops.linear(x, weight, b), reference.linear(x64, exact, b64), limit)
    out = torch.full((rows, width), torch.nan, dtype=dtype, device=CUDA)
    assert ops.linear(x, weight, b, norm, out) is out
    near(out, reference.linear(x64, exact, b64, norm64), limit)
    gated = reference.gated_linear(x64, exact, b64, norm64)
    near(ops.gated_linear(x, weight, b, norm), gated, 3 * limit)
    expected = reference.add_linear(total64, x64, exact, b64)
    assert ops.add_linear(total, x, weight, b) is total
    near(total, expected, limit)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "width", "dtype"),
    [
        (1, 4096, 6144, torch.bfloat16),
        (1, 1001, 70, torch.float16),
        (2, 1001, 70, torch.bfloat16),  # for which torch has no product
        (2, 4096, 6144, torch.bfloat16),
        (17, 1792, 4096, torch.float16),
        (64, 14336, 4096, torch.bfloat16),
        (300, 904, 584, torch.bfloat16),
        (2051, 4096, 1152, torch.bfloat16),  # in two parts
        (4, 64, 32, torch.float32),
    ],
)
def test_linear_of_int8_weights(
    rows: int, depth: int, width: int, dtype: torch.dtype, bias: bool
) -> None:
    """Several rows of x are rounded too: of 4,096 normal numbers by about 1% of the result; of
    products of two normal numbers, whose largest one is larger, by about 2%.
    """
    ops, limit = select_ops(CUDA), 0.02 if rows > 1 else TOLERANCE[torch.bfloat16]
    x, total, gain = (randn(*s, dtype=dtype) for s in ((rows, depth), (rows, width), (depth,)))
    numbers = torch.randint(-128, 128, (width, depth), device=CUDA).to(torch.int8)
    weight = Int8Weight(numbers, torch.rand(width, 1, device=CUDA) / depth**0.5 / 30 + 1e-5)
    exact = numbers.double().cpu() * weight.scales.double().cpu()
    b = randn(width, dtype=dtype) if bias else None
    x64, b64, total64, gain64 = (
        None if t is None else t.double().cpu() for t in (x, b, total, gain)
    )
    norm, norm64 = (gain, 1e-5), (gain64, 1e-5)
    near(ops.linear(x, weight, b), reference.linear(x64, exact, b64), limit)
    out = torch.full((rows, width), torch.nan, dtype=dtype, device=CUDA)
    assert ops.linear(x, weight, b, norm, out) is out
    near(out, reference.linear(x64, exact, b64, norm64), limit if rows == 1 else 2 * limit)
    gated = reference.gated_linear(x64, exact, b64, norm64)
    near(ops.gated_linear(x, weight, b, norm), gated, 3 * limit)
    expected = reference.add_linear(total64, x64, exact, b64)
    assert ops.add_linear(total, x, weight, b) is total
    near(total, expected, limit)
    again = total.clone()
    ops.add_linear(again, x, weight, b)
    other = total.clone()
    assert torch.equal(ops.add_linear(other, x, weight, b), again)


@pytest.mark.parametrize("rows", [2, 300])
def test_int8_products_in_a_graph(rows: int) -> None:
    ops, x = select_ops(CUDA), randn(rows, 1024)
    numbers = torch.randint(-128, 128, (512, 1024), device=CUDA).to(torch.int8)
    weight = Int8Weight(numbers, torch.rand(512, 1, device=CUDA) / 1000)
    x[1, 5] = torch.inf
    expected = ops.linear(x, weight)
    assert expected[1].isnan().all() and expected[0].isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(x, weight)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("block", [(1, 0), (128, 128), None])
@pytest.mark.parametrize(("rows", "width"), [(70, 896), (300, 14336)])
def test_activations_rounded_for_the_next_product(
    rows: int, width: int, block: tuple[int, int] | None, act: str
) -> None:
    """With the bits of two kernels, one after the other."""
    ops, down = select_ops(CUDA), made_fp8(block, 512, width)
    x = randn(rows, 2 * width)
    x[3, 7] = torch.nan
    found, plain = ops.activate(x, act, True, down), ops.activate(x, act, True)
    assert isinstance(found, RoundedRows) and isinstance(plain, torch.Tensor)
    y, expected = ops.linear(found, down), ops.linear(plain, down)
    assert y[3].isnan().all() and y[4:].isfinite().all()
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("block", [(1, 0), (128, 128), None])
@pytest.mark.parametrize("depth", [512, 896])
def test_rows_that_are_not_numbers_stay_so(
    depth: int, block: tuple[int, int] | None, rows: int
) -> None:
    """Else a model that fails would go on with numbers."""
    ops = select_ops(CUDA)
    x, weight = randn(rows, depth), made_fp8(block, 256, depth)
    x[3, 7] = torch.nan
    y = ops.linear(x, weight)
    assert y[3].isnan().all() and y[torch.arange(rows) != 3].isfinite().all()
    assert ops.linear(x[3:4], weight).isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64, 200])
@pytest.mark.parametrize("block", [(1, 0), (128, 128), None])
@pytest.mark.parametrize(("depth", "width"), [(4096, 6144), (14336, 4096), (896, 640)])
def test_fp8_products_again(
    depth: int, width: int, block: tuple[int, int] | None, rows: int
) -> None:
    """Of an x that rounding leaves as it is: near the truth, and the same bits every time."""
    from gllm_engine.ops import triton

    product, limit = triton.gemv if rows == 1 else triton.skinny, TOLERANCE[torch.bfloat16]
    x = randn(rows, depth).clamp(-448, 448).to(FLOAT8).to(torch.bfloat16)
    x[:, ::64] = 448.0
    weight, total = made_fp8(block, width, depth), randn(rows, width)
    exact, x64 = on_cpu(weight).to(CUDA), x.double()
    added = torch.empty_like(total)

    def run() -> list[Tensor]:
        added.copy_(total)
        product(x, weight, out=added, add=True)
        return [added, product(x, weight, gated=True)]

    first = [t.clone() for t in run()]
    near(first[0], reference.add_linear(total.double(), x64, exact, None), limit)
    near(first[1], reference.gated_linear(x64, exact, None, None), 3 * limit)
    check_replays(run, first)


def rounded_rows(x: Tensor, columns: int | None) -> Tensor:
    """The numbers that products with FP8 weights take for x."""
    from gllm_engine.ops import triton

    found = triton.quantize(x, columns)
    scales = found.scales[: len(x)].double()
    size = columns or x.shape[1]
    return found.numbers[: len(x)].double() * scales.repeat_interleave(size, 1)[:, : x.shape[1]]


def sum_rounded(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Fp8Weight, down: Fp8Weight
) -> Tensor:
    """The sum over experts in float64, with the inputs of both products rounded to float8."""
    columns = 128 if gate_up.scales.shape[2] > 1 else None
    rows, out = rounded_rows(x, columns), torch.zeros_like(x, dtype=torch.float64)
    for expert in range(len(down)):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        matrix = on_cpu(gate_up[expert]).to(CUDA)
        hidden = reference.gated_linear(rows[token], matrix, None, None).to(x.dtype)
        y = rounded_rows(hidden, columns) @ on_cpu(down[expert]).to(CUDA).T
        out.index_add_(0, token, y * weights[token, choice, None].double())
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", [(1, 0), (128, 128), None])
@pytest.mark.parametrize("tokens", [1, 33, 90, 300, 1700])
def test_experts_of_fp8_weights(
    tokens: int, block: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    """x is not rounded for one token, nor if it is float32: then as near as plain weights."""
    ops = select_ops(CUDA)
    x = randn(tokens, 2048, dtype=dtype)
    gate_up, down = made_fp8(block, 16, 1536, 2048), made_fp8(block, 16, 2048, 768)
    chosen = torch.rand(tokens, 16, device=CUDA).argsort(1)[:, :4].int().contiguous()
    routing = torch.rand(tokens, 4, device=CUDA), chosen
    found = ops.sum_experts(x, *routing, gate_up, down, 0, 16)
    if tokens == 1 or dtype == torch.float32:
        exact = (on_cpu(gate_up).to(CUDA), on_cpu(down).to(CUDA))
        near(
            found, reference.sum_experts(x.double(), *routing, *exact, 0, 16), 2 * TOLERANCE[dtype]
        )
    else:
        near(found, sum_rounded(x, *routing, gate_up, down), 0.01)
    assert torch.equal(ops.sum_experts(x, *routing, gate_up, down, 0, 16), found)
    x[0, 7] = torch.nan
    found = ops.sum_experts(x, *routing, gate_up, down, 0, 16)
    assert found[0].isnan().all() and found[1:].isfinite().all()


def exact_rows(rows: Tensor | RoundedRows, count: int) -> Tensor:
    if isinstance(rows, Tensor):
        return rows[:count].double()
    return rows.numbers[:count].double() * rows.scales[:count].repeat_interleave(128, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["16 bits", "float8", "float8, rounded again"])
@pytest.mark.parametrize(("first", "held"), [(0, 64), (16, 32)])
def test_blocks_of_rows(
    first: int, held: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel for many rows against the one for all others: of some experts every token is one,
    of one a single token, and of many none. With the same bits in a graph.
    """
    from gllm_engine.ops.triton import moe, quantize

    tokens = 3000
    likely = torch.linspace(8, -8, 64, device=CUDA).index_fill(
        0, torch.arange(40, 64, device=CUDA), -torch.inf
    )
    scores = likely + torch.rand(tokens, 64, device=CUDA).log().neg().log().neg()
    scores[5, 45] = 99
    chosen = scores.topk(4).indices.int()
    float8 = kind != "16 bits"
    tiles = moe.choose_tiles(tokens, 4, held, RoundedRows if float8 else Tensor)
    order, groups = moe.sort_pairs(chosen, first, held, tiles.rows)
    pairs = int(groups[1, held - 1])
    gate_up, down = (
        made_fp8((128, 128), held, *size) if float8 else randn(held, *size, dtype=dtype) / 30
        for size in ((768, 512), (512, 384))
    )
    for gated, matrix in ((True, gate_up), (False, down)):
        x: Any = randn(tokens if gated else tokens * 4, matrix.shape[2], dtype=dtype)
        x = quantize(x, 128) if float8 else x
        assert moe.takes_blocks(x, matrix, tiles.rows)
        then = down if gated and kind == "float8, rounded again" else None
        args = (x, matrix, order, groups, 4, tiles, gated)

        def product(args: Any = args, then: Any = then, gated: bool = gated) -> Tensor:
            found = exact_rows(moe.grouped_product(*args, then=then), tokens * 4)
            return found[:pairs] if gated else found[order[:pairs].long()]

        found = product()
        check_replays(lambda product=product: [product()], [found])
        with monkeypatch.context() as patch:
            patch.setattr(moe, "takes_blocks", lambda *_: False)
            near(found, product(), 0.03 if then else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, (128, 8)), (70, (60, 4)), (5000, (128, 8)), (2049, (8, 2))]
)
def test_route(tokens: int, experts: tuple[int, int], renorm: bool, dtype: torch.dtype) -> None:
    """In 16 bits many experts are equally likely; then too it is the first ones that are taken."""
    num_experts, top_k = experts
    routing = Routing(top_k, renorm)
    logits = randn(tokens, num_experts, dtype=dtype)
    weights, chosen = select_ops(CUDA).route(logits, routing, None)
    expected_weights, expected = reference.route(logits.cpu(), routing, None)
    near(weights, expected_weights, 1e-5)
    assert torch.equal(chosen.cpu(), expected)


BIASED = {
    "ernie": (64, Routing(6, True, biased=True, least_sum=1e-12)),
    "glm": (128, Routing(8, True, "sigmoid", biased=True, sum_eps=1e-20, scale=2.5)),
    "deepseek v2": (160, Routing(6, False, groups=8, kept_groups=3, scale=16.0)),
    "deepseek v3": (
        256,
        Routing(8, True, "sigmoid", True, groups=8, kept_groups=4, sum_eps=1e-20, scale=2.5),
    ),
    "kimi": (384, Routing(8, True, "sigmoid", biased=True, sum_eps=1e-20, scale=2.827)),
    "llama4": (16, Routing(1, False, "sigmoid")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 70, 5000])
@pytest.mark.parametrize("name", BIASED)
def test_other_routings(name: str, tokens: int, dtype: torch.dtype) -> None:
    """And in a graph, which reads the logits and the bias of its replay."""
    num_experts, routing = BIASED[name]
    logits = randn(tokens, num_experts, dtype=dtype)
    bias = 0.1 * randn(num_experts, dtype=torch.float32) if routing.biased else None
    route, graph = select_ops(CUDA).route, torch.cuda.CUDAGraph()
    route(logits, routing, bias)
    with torch.cuda.graph(graph):
        weights, chosen = route(logits, routing, bias)
    logits.copy_(randn(tokens, num_experts, dtype=dtype))
    if bias is not None:
        bias.mul_(-2)
    graph.replay()
    expected_weights, expected = reference.route(logits, routing, bias)
    # Two sums of score and bias an ulp apart may be one to the other's exp().
    same = (chosen == expected).all(1)
    assert same.float().mean() > (0.99 if routing.biased else 0.9999)
    near(weights[same], expected_weights[same], 1e-5)
    assert all(len(set(row)) == routing.top_k for row in chosen.tolist())


# Tokens, (experts, chosen), dim, hidden, (first held, number of held).
MIXTURES = {
    "one": (1, (128, 8), 2048, 768, (0, 128)),
    "few": (9, (128, 8), 2048, 768, (0, 128)),
    "sorted in several programs": (300, (128, 8), 512, 768, (0, 128)),
    "blocks of 64": (1000, (128, 8), 512, 256, (0, 128)),
    "blocks of 128": (4000, (128, 8), 512, 768, (0, 128)),
    "a part": (500, (60, 4), 1024, 352, (15, 15)),
    "mixtral": (700, (8, 2), 1024, 1792, (0, 8)),
    "one of eight": (700, (8, 2), 1024, 1792, (7, 1)),
    "sizes that no tile divides": (2500, (20, 3), 200, 72, (3, 11)),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("likely", [0.0, 6.0], ids=["even", "uneven"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts(name: str, likely: float, dtype: torch.dtype) -> None:
    """Against float64, from the same routing; a second time the same bits; and in a graph."""
    tokens, (num_experts, top_k), dim, hidden, (first, held) = MIXTURES[name]
    ops, limit = select_ops(CUDA), 2 * TOLERANCE[dtype]
    logits = randn(tokens, num_experts)
    logits[:, first] += likely  # most tokens choose that one
    routing = ops.route(logits, Routing(top_k, True), None)
    x = randn(tokens, dim, dtype=dtype)
    gate_up = (randn(held, 2 * hidden, dim, dtype=torch.float32) / dim**0.5).to(dtype)
    down = (randn(held, dim, hidden, dtype=torch.float32) / hidden**0.5).to(dtype)
    args = (x, *routing, gate_up, down, first, num_experts)
    wide = x.double(), *routing, gate_up.double(), down.double(), first, num_experts
    expected = reference.sum_experts(*wide)
    out = ops.sum_experts(*args)
    near(out, expected, limit)
    assert torch.equal(ops.sum_experts(*args), out)
    total = randn(tokens, dim, dtype=dtype)
    graph, before = torch.cuda.CUDAGraph(), total.clone()
    ops.sum_experts(*args, total.clone())
    with torch.cuda.graph(graph):
        ops.sum_experts(*args, total)
    other = ops.route(
        logits.roll(1, 0), Routing(top_k, False), None
    )  # another routing, in the same memory
    for there, new in zip(routing, other, strict=True):
        there.copy_(new)
    graph.replay()
    near(total, before.double() + reference.sum_experts(*wide), limit)


@pytest.mark.parametrize("tokens", [1, 300, 4000])
@pytest.mark.parametrize(
    "kind", [{"on_input": True}, {"clamp": Clamp(1.0, 1.702)}, {"biased": True}], ids=str
)
def test_other_experts(kind: dict[str, Any], tokens: int) -> None:
    """Weights on the input, a clamped activation, biases: against float64."""
    kind, ops, limit = dict(kind), select_ops(CUDA), 2 * TOLERANCE[torch.bfloat16]
    x = randn(tokens, 512)
    gate_up, down = randn(32, 768, 512) / 512**0.5, randn(32, 512, 384) / 384**0.5
    biases = (randn(32, 768), randn(32, 512)) if kind.pop("biased", False) else (None, None)
    routing = ops.route(randn(tokens, 32), Routing(4, False, "sigmoid"), None)
    wide = [None if bias is None else bias.double() for bias in biases]
    expected = reference.sum_experts(
        x.double(), *routing, gate_up.double(), down.double(), 0, 32, biases=tuple(wide), **kind
    )
    near(ops.sum_experts(x, *routing, gate_up, down, 0, 32, biases=biases, **kind), expected, limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64])
@pytest.mark.parametrize(
    ("depth", "width"), [(4096, 6144), (14336, 4096), (6400, 5120), (1001, 70), (200, 28672)]
)
def test_products_of_few_rows(
    rows: int, depth: int, width: int, bias: bool, dtype: torch.dtype
) -> None:
    """Whether or not the dispatch prefers them: near the truth, and the same bits every time."""
    from gllm_engine.ops import triton

    product, limit = triton.gemv if rows == 1 else triton.skinny, TOLERANCE[dtype]
    x, total, gain = (randn(*s, dtype=dtype) for s in ((rows, depth), (rows, width), (depth,)))
    weight = (randn(width, depth, dtype=torch.float32) / depth**0.5).to(dtype)
    b = randn(width, dtype=dtype) if bias else None
    wide = [None if t is None else t.double() for t in (x, weight, b, total, gain)]
    x64, weight64, b64, total64, gain64 = wide
    norm, norm64 = (gain, 1e-5), (gain64, 1e-5)
    added = torch.empty_like(total)

    def run() -> list[Tensor]:
        added.copy_(total)
        product(x, weight, b, out=added, add=True)
        return [added, product(x, weight, b, norm), product(x, weight, b, norm, gated=True)]

    first = [t.clone() for t in run()]
    near(first[0], reference.add_linear(total64, x64, weight64, b64), limit)
    near(first[1], reference.linear(x64, weight64, b64, norm64), limit)
    near(first[2], reference.gated_linear(x64, weight64, b64, norm64), 3 * limit)
    check_replays(run, first)


def check_replays(run: Callable[[], list[Tensor]], first: list[Tensor]) -> None:
    """A graph of `run` gives the same bits as `first` at every replay."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for _ in range(20):
        for t in recorded:
            t.fill_(torch.nan)
        graph.replay()
        assert all(map(torch.equal, recorded, first))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(1, 2, 72), (577, 32, 80), (10600, 32, 72), (300, 26, 64), (9, 3, 128)],
)
def test_rotation_alone(
    tokens: int, heads: int, dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    ops = select_ops(CUDA)
    x = randn(tokens, heads + heads // 2, dim, dtype=dtype)[:, :heads]
    angles = torch.rand(500, dim // 2, device=CUDA) * 6
    positions = torch.randint(0, 500, (tokens,), device=CUDA)
    args = (angles.cos(), angles.sin(), positions, torch.float32, interleaved)
    exact = reference.rotate(x.double(), reference.rotary_inputs(*args))
    near(ops.rotate(x, ops.rotary_inputs(*args)), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [64] * 30, [1300], [5, 700, 64, 513], [9000]])
@pytest.mark.parametrize("dim", [64, 72, 80, 128])
def test_attention_within_segments(dim: int, lengths: list[int], dtype: torch.dtype) -> None:
    """Of a tower's heads: q and k lie together, and v in the product that they came from. A plan
    after another one, and two layers of each.
    """
    plan = select_ops(CUDA).make_segment_planner(4, dim, dtype, CUDA)
    for some in (lengths, lengths[::-1]):
        attend = plan(some)
        for _ in range(2):
            qk, v = randn(sum(some), 8, dim, dtype=dtype), randn(sum(some), 12, dim, dtype=dtype)
            parts = (*qk.chunk(2, 1), v[:, 8:])
            exact = Segments(some, CUDA).attend(*(x.float() for x in parts))
            near(attend(*parts), exact, TOLERANCE[dtype])


def near(out: Tensor, expected: Tensor, limit: float) -> None:
    """By norm: one element may be off by a rounding step, many may not."""
    out, expected = out.double().cpu(), expected.double().cpu()
    assert out.shape == expected.shape and out.isfinite().all()
    assert (out - expected).norm() <= limit * expected.norm()


def on_gpu(batch: Batch) -> Batch:
    moved = {k: v.to(CUDA) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **moved)


DECODE = [(1, 1), (17, 1), (16, 1), (300, 1), (33, 1), (2049, 1)]
LONG = [(2900, 1), (257, 1), (256, 1)]  # several parts each
CHUNKS = [(5, 5), (16, 16), (21, 4), (640, 517), (33, 1)]
FRESH = [(300, 300), (1, 1), (17, 17)]  # these need not be read from pages
MIXES = {
    "decode": DECODE, "long": LONG, "many": DECODE * 30, "one": [(1, 1)],
    "chunks": CHUNKS, "both": DECODE + CHUNKS, "fresh": FRESH, "all": DECODE + CHUNKS + FRESH,
}  # fmt: skip
# Ends of rows and of what they see at all places in a kernel's tiles, of 64, 128 or 192 tokens.
ODD = [*CHUNKS[3:], (1300, 300), (131, 130), (2049, 1), (130, 1), (1001, 193), (129, 128), *FRESH]


def run_attention(
    mix: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    window: int | None,
    page_size: int,
    cache_dtype: torch.dtype | None = None,
    chunked: bool = False,
    sunk: bool = False,
    size: float = 1.0,
) -> None:
    """`size`: of the numbers of queries."""
    num_heads, kv_heads, dim = heads
    ops, limit = select_ops(CUDA), TOLERANCE[dtype]
    seed = int(torch.randint(1 << 30, ()))
    rows = ODD if mix == "odd" else MIXES[mix]
    batch, kv, cache = make_case(rows, page_size, kv_heads, seed, dim)
    # Chunks of one token stand among the chunks here.
    num_decode = next((i for i, (_, n) in enumerate(rows) if n > 1), len(rows))
    batch = replace(batch, num_decode=num_decode)
    cache, kv = cache.to(cache_dtype or dtype), kv.to(dtype)
    q = (size * torch.randn(len(batch.tokens), num_heads, dim)).to(dtype)
    qkv = torch.cat((q, kv.flatten(1, 2)), 1)
    cos, sin = torch.rand(2, 3000, dim // 2)
    moved, there = on_gpu(batch), cache.to(CUDA)
    planner = ops.make_planner(CUDA, dtype)
    plan = planner.plan(
        moved, there, AttentionShape(num_heads, kv_heads, dim, window, chunked=chunked)
    )
    sinks = (2 * torch.randn(num_heads)).to(dtype) if sunk else None
    sinks_there = None if sinks is None else sinks.to(CUDA)
    rotary = ops.rotary_inputs(cos.to(CUDA), sin.to(CUDA), moved.positions, dtype, False)
    found = ops.rotate_and_store(qkv.to(CUDA), num_heads, None, rotary, there, plan)
    out, (out_q, kept) = ops.attend(found, there, plan, sinks=sinks_there), found
    # The twin in float32, from what the kernel stored: attention by itself.
    wide = there.float().cpu()
    page, offset = batch.cache_index // page_size, batch.cache_index % page_size
    slow = reference.plan_attention(batch, wide, window, chunked=chunked)
    attended, queries = wide.clone(), out_q.float().cpu()
    attend_limit = limit
    if plan.rounds and kept is not None:
        rounded = queries.clamp(-448, 448).to(FLOAT8).float()
        assert torch.equal(kept[:, :num_heads].float().cpu(), rounded)
        first = plan.num_decode if plan.rounds_paged else plan.first_fresh
        queries[first:] = rounded[first:]
        # The kernel rounds the weights of values, by up to a sixteenth: by 2.7% of the result, as
        # values are independent. Equal weights are not changed.
        attend_limit = 0.04 if size else limit
    elif kept is not None:  # fresh chunks attend to what was not rounded yet
        at = slice(plan.first_fresh, None)
        unrounded = kept[at].float().cpu().unflatten(1, (2, kv_heads))
        attended[page[at], :, offset[at]] = unrounded
    wide_sinks = None if sinks is None else sinks.float()
    exact_out = reference.attend(AttentionInputs(queries), attended, slow, sinks=wide_sinks)
    near(out, exact_out, attend_limit)
    again = ops.attend(found, there, plan, sinks=sinks_there)
    assert torch.equal(again, out)  # whoever came last in a joined row
    # And what it stored.
    exact = cache.float()
    slow = reference.plan_attention(batch, exact, window)
    slow_rotary = reference.rotary_inputs(cos, sin, batch.positions, torch.float32, False)
    args = (qkv.float(), num_heads, None, slow_rotary, exact, slow)
    near(out_q, reference.rotate_and_store(*args).q, limit)
    # Numbers beside a border may be rounded to either side.
    near(wide[page, :, offset], exact[page, :, offset], 4e-2 if cache_dtype else limit)
    wide[page, :, offset] = exact[page, :, offset]
    torch.testing.assert_close(wide, exact, equal_nan=True)  # nothing else was touched


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dim", [64, 128])
def test_attention(mix: str, dim: int) -> None:
    run_attention(mix, torch.bfloat16, (8, 2, dim), None, 16)


@pytest.mark.parametrize("mix", MIXES)
def test_attention_with_a_window(mix: str) -> None:
    run_attention(mix, torch.bfloat16, (4, 2, 64), 20, 16)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [20, 32, 512])
def test_attention_in_chunks_of_the_sequence(mix: str, window: int) -> None:
    """Of whole pages, in FlashInfer's kernels, and others."""
    run_attention(mix, torch.bfloat16, (4, 2, 64), window, 16, chunked=True)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "window"),
    [
        (torch.bfloat16, None, None),
        (torch.bfloat16, None, 128),
        (torch.bfloat16, FLOAT8, None),
        (torch.bfloat16, FLOAT8, 128),
        (torch.float32, None, 128),
    ],
)
def test_attention_with_sinks(
    mix: str, dtype: torch.dtype, cache_dtype: torch.dtype | None, window: int | None
) -> None:
    run_attention(mix, dtype, (16, 2, 64), window, 16, cache_dtype, sunk=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_kernels(dtype: torch.dtype) -> None:
    run_attention("both", dtype, (4, 2, 24), 7, 4)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("dtype", "heads", "window"),
    [
        (torch.bfloat16, (8, 2, 64), None),
        (torch.bfloat16, (32, 8, 128), None),
        (torch.bfloat16, (4, 2, 64), 20),
        (torch.float16, (8, 1, 64), None),
        (torch.bfloat16, (8, 2, 256), None),
    ],
)
def test_attention_over_a_float8_cache(
    mix: str, dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> None:
    run_attention(mix, dtype, heads, window, 16, FLOAT8)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize(
    ("heads", "window"),
    [
        *[((32, 8, 128), None), ((8, 1, 64), None), ((8, 2, 256), None)],
        *[((8, 2, 64), window) for window in (1, 20, 128, 300)],
    ],
)
@pytest.mark.parametrize("page_size", [1, 16])
def test_chunks_over_float8_pages(
    page_size: int, heads: tuple[int, int, int], window: int | None, size: float
) -> None:
    """With queries of 0 the mean of the values that are seen: one more or less would show. With
    those of 1e4, beyond float8, about the value of the key that is most like the query.
    """
    run_attention("odd", torch.bfloat16, heads, window, page_size, FLOAT8, size=size)


def test_queries_of_chunks_that_are_not_numbers_stay_so() -> None:
    """Over float8 pages; an infinite one is, on Hopper, the largest number."""
    ops = select_ops(CUDA)
    batch, _, cache = make_case([(300, 170)], 16, 2, head_dim=64)
    moved, there = on_gpu(batch), cache.to(FLOAT8).to(CUDA)
    plan = ops.make_planner(CUDA, torch.bfloat16).plan(moved, there, AttentionShape(4, 2, 64, None))
    qkv = randn(170, 8, 64)
    qkv[7, 1, 3] = torch.nan
    if plan.rounds:
        qkv[9, 2, 5] = torch.inf
    found = ops.attend(ops.rotate_and_store(qkv, 4, None, None, there, plan), there, plan)
    expected = torch.zeros(170, 4, 64, dtype=torch.bool, device=CUDA)
    expected[7, 1] = True
    assert torch.equal(~found.view(170, 4, 64).isfinite(), expected)


@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.float32, 64), (torch.bfloat16, 24), (torch.float16, 24)]
)
def test_attention_over_a_float8_cache_without_kernels(dtype: torch.dtype, dim: int) -> None:
    run_attention("all", dtype, (4, 2, dim), 7, 4, FLOAT8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_to_float8(dtype: torch.dtype) -> None:
    """Every number that 16 bits can say, NaN and infinity too, as its slow twin rounds it."""
    numbers = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
    if dtype == torch.float16:
        numbers = numbers.view(dtype)
    batch, _, cache = make_case([(256, 256)], 16, 2, head_dim=64)
    qkv = numbers.to(dtype).view(256, 4, 64)
    qkv = torch.cat((qkv[:, :2], qkv), 1)
    cache, ones, zeros = cache.to(FLOAT8), torch.ones(300, 32), torch.zeros(300, 32)
    there, moved, ops = cache.to(CUDA), on_gpu(batch), select_ops(CUDA)
    rotary = ops.rotary_inputs(ones.to(CUDA), zeros.to(CUDA), moved.positions, dtype, False)
    plan = ops.FlashInferPlan(moved.cache_index, 0, keeps=True)
    _, kept = ops.rotate_and_store(qkv.to(CUDA), 2, None, rotary, there, plan)
    rotary = reference.rotary_inputs(ones, zeros, batch.positions, dtype, False)
    slow = reference.plan_attention(batch, cache, None, dtype)
    reference.rotate_and_store(qkv, 2, None, rotary, cache, slow)
    assert cache.float().nan_to_num().abs().max() == 448 and cache.float().isnan().any()
    torch.testing.assert_close(there.cpu().float(), cache.float(), rtol=0, atol=0, equal_nan=True)
    if kept.dtype == FLOAT8:
        page, offset = moved.cache_index // 16, moved.cache_index % 16
        kv = there.view(torch.uint8)[page, :, offset].flatten(1, 2)
        assert torch.equal(kept.view(torch.uint8), torch.cat((kv[:, :2], kv), 1))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "turn_dim"), [(64, 64), (128, 64), (16, 16), (80, 40)])
def test_rotation(norm: bool, interleaved: bool, dim: int, turn_dim: int) -> None:
    batch, kv, cache = make_case([(9, 1), (70, 61)], 16, 3, head_dim=dim)
    ops, heads = select_ops(CUDA), 6
    qkv = torch.randn(62, heads + 6, dim)
    gain = HeadNorm(torch.rand(heads + 3, dim) + 0.5, 1e-5) if norm else None
    angles = torch.rand(100, turn_dim // 2) * 6
    plan = reference.plan_attention(batch, cache, None)
    rotary = reference.rotary_inputs(
        angles.cos(), angles.sin(), batch.positions, torch.float32, interleaved
    )
    there, moved = cache.to(CUDA), on_gpu(batch)
    rotary_there = ops.rotary_inputs(
        angles.cos().to(CUDA), angles.sin().to(CUDA), moved.positions, torch.float32, interleaved
    )
    out = ops.rotate_and_store(
        *(qkv.to(CUDA), heads, None if gain is None else gain._replace(gain=gain.gain.to(CUDA))),
        *(rotary_there, there, ops.FlashInferPlan(moved.cache_index, 1)),
    )
    args = (qkv, heads, gain, rotary, cache, plan)
    near(out.q, reference.rotate_and_store(*args).q, 1e-5)
    torch.testing.assert_close(there.cpu(), cache, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_list_pages() -> None:
    from gllm_engine.ops import triton

    table = torch.randint(0, 1 << 20, (40, 3010))
    counts = [0, 1, 3000, 17, 1024, 1025]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    slots = torch.randperm(40)[: len(counts)]
    firsts = torch.arange(len(counts)).int()
    out = torch.full((sum(counts) + 5,), -1, dtype=torch.int32)
    there = out.to(CUDA)
    inputs = (table, slots, starts, firsts)
    triton.list_pages(*(x.to(CUDA) for x in inputs), 3000, there)
    reference.list_pages(*inputs, 3000, out)
    assert torch.equal(there.cpu(), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 9), (64, 2048), (300, 5000), (40, 128256)])
def test_sample(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """The same tokens as the slow twin, but where the random number hits a boundary."""
    scores = (randn(rows, vocab, dtype=torch.float32) * 4).to(dtype)
    scores[::3, ::2] = -float("inf")
    num_slots = rows + 7
    slots = torch.randperm(num_slots, device=CUDA)[:rows]
    temperature = torch.rand(num_slots, dtype=torch.float64, device=CUDA) * 2 + 0.01
    temperature[slots[::4]] = 0
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_slots,), device=CUDA)
    prompt_lens = torch.randint(0, 4000, (num_slots,), device=CUDA)
    lengths = prompt_lens + torch.randint(0, 4000, (num_slots,), device=CUDA)
    last, last_expected = torch.full((2, num_slots), -5, device=CUDA)
    state = PlainSampling(temperature, seeds, prompt_lens, lengths, last)
    tokens = select_ops(CUDA).sample_plain(scores, slots, state)
    twin = state._replace(last_tokens=last_expected)
    expected = reference.sample_plain(scores, slots, twin)
    last_expected[slots] = tokens
    assert torch.equal(last, last_expected)
    cold = temperature[slots] == 0
    assert torch.equal(tokens[cold], expected[cold])
    heat = torch.where(cold, 1.0, temperature[slots].float())[:, None].double()
    weights = (scores.double() / heat).softmax(-1)
    above = weights.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    below = above - weights.gather(1, tokens[:, None])[:, 0]
    u = reference.uniforms(seeds[slots], (lengths - prompt_lens)[slots])
    assert ((below - 1e-5 <= u) & (u <= above + 1e-5) | cold).all()
    assert (tokens == expected).float().mean() > 0.97
    assert (weights.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize("vocab", [5000, 4096])
def test_scores_that_are_no_numbers_still_give_a_token(vocab: int) -> None:
    scores = randn(4, vocab)
    scores[0], scores[1, 7], scores[2], scores[3, -1] = torch.nan, torch.nan, -torch.inf, torch.nan
    for heat in (0.0, 1.0):
        zeros = torch.zeros(4, dtype=torch.int64, device=CUDA)
        temperature = torch.full((4,), heat, dtype=torch.float64, device=CUDA)
        slots = torch.arange(4, device=CUDA)
        state = PlainSampling(temperature, zeros, zeros, zeros.clone(), zeros.clone())
        tokens = select_ops(CUDA).sample_plain(scores, slots, state)
        assert ((tokens >= 0) & (tokens < vocab)).all()


def test_no_rows() -> None:
    ops = select_ops(CUDA)
    empty = randn(0, 64)
    norm = randn(64), 1e-5
    assert ops.rms_norm(empty, *norm).shape == (0, 64)
    assert ops.linear(empty, randn(20, 64), randn(20)).shape == (0, 20)
    assert ops.gated_linear(empty, randn(20, 64), None, norm).shape == (0, 10)
    assert ops.add_linear(randn(0, 20), empty, randn(20, 64), None).shape == (0, 20)
