"""The kernels of the gated delta rule against their slow twin, interpreted or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from devices import DEVICES, INTERPRETED
from torch import Tensor

from gllm_engine.ops import RecurrentState, reference

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
BF16 = torch.bfloat16
CPU = torch.device("cpu")
# k_heads, v_heads, k_dim, v_dim, taps
SHAPES = [(2, 4, 16, 32, 4), (1, 3, 24, 40, 3), (2, 2, 8, 8, 2)]
ROWS = {
    "decode": [1, 1, 1],
    "short": [5, 1, 2, 15],
    "both": [1, 1, 9],
    "long": [16, 65],
    "all": [1, 1, 15, 16, 2, 17, 63, 64, 65, 200],
}
# So few columns of the state that the twin is quick.
SMALL = (1, 2, 32, 16, 4)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty gives is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers in bfloat16, the interpreter would multiply the bits."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


class Inputs(NamedTuple):
    qkv: Tensor
    b: Tensor
    a: Tensor
    conv: Tensor
    a_log: Tensor
    dt_bias: Tensor
    conv_state: Tensor
    matrix: Tensor
    slots: Tensor

    def to(self, device: str) -> Inputs:
        """Copies with the same strides."""
        copies = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in self)
        return Inputs(*(copy.copy_(t).to(device) for copy, t in zip(copies, self, strict=True)))


def make_inputs(
    lens: list[int], shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32
) -> Inputs:
    """The layer's numbers are views of wider rows, and states have the stride of all states."""
    k_heads, v_heads, k_dim, v_dim, taps = shape
    width, slots = 2 * k_heads * k_dim + v_heads * v_dim, len(lens) + 3
    packed = torch.randn(sum(lens), width + 2 * v_heads + 3).to(dtype)
    qkv, b, a, _ = packed.split((width, v_heads, v_heads, 3), 1)
    return Inputs(
        qkv,
        b,
        a * 10,  # on both sides of softplus' bend
        torch.randn(width, taps).to(dtype),
        torch.rand(v_heads),
        torch.randn(v_heads),
        torch.randn(slots, 3, width, taps - 1).to(dtype)[:, 1],
        torch.randn(slots, 2, v_heads, k_dim, v_dim)[:, 1],
        torch.randperm(slots)[: len(lens)],
    )


def run(inputs: Inputs, lens: list[int], device: str) -> tuple[Tensor, RecurrentState]:
    """The kernels' results, and the states of all slots after them."""
    kernels = import_module("gllm_engine.ops.triton.gated_delta")
    there = inputs.to(device)
    state = RecurrentState(there.conv_state, there.matrix)
    plan = kernels.plan_rows(lens, torch.device(device))
    rows = kernels.RowPlan(there.slots, *plan)
    out = there.qkv.new_empty(len(there.qkv), there.matrix[0, :, 0].numel())
    found = kernels.gated_delta(*there[:6], state, rows, out)
    assert found.data_ptr() == out.data_ptr()
    return found.cpu(), RecurrentState(*(part.cpu() for part in state))


def run_twin(inputs: Inputs, lens: list[int]) -> tuple[Tensor, RecurrentState]:
    here = inputs.to("cpu")
    state = RecurrentState(here.conv_state, here.matrix)
    num_decode = next((i for i, n in enumerate(lens) if n > 1), len(lens))
    plan = reference.RowPlan(here.slots, lens, num_decode)
    return reference.gated_delta(*here[:6], state, plan), state


def off(found: Tensor, expected: Tensor) -> float:
    """The difference by norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_are_their_twin(
    device: str, rows: str, shape: tuple[int, int, int, int, int]
) -> None:
    inputs = make_inputs(ROWS[rows], shape)
    found, state = run(inputs, ROWS[rows], device)
    expected, then = run_twin(inputs, ROWS[rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.conv, then.conv, rtol=0, atol=0)
    torch.testing.assert_close(state.matrix, then.matrix, rtol=1e-4, atol=1e-4)


def make_hard(inputs: Inputs, kind: str) -> None:
    """Put numbers into `inputs` with which blocks of tokens lose precision, if they can."""
    _, v_heads, k_dim, _ = inputs.matrix.shape
    if kind in ("equal keys", "similar keys"):
        keys = inputs.qkv[:, -v_heads * inputs.matrix.shape[3] - k_dim :][:, :k_dim]
        keys[:] = keys[:1] + (kind == "similar keys") * 0.05 * keys
        inputs.conv.abs_()
        inputs.a.fill_(-30)  # no decay
        inputs.b.fill_(7)  # rates near 1
    elif kind == "strong decay":
        inputs.a_log.fill_(3)
        inputs.a.abs_()
    elif kind == "forgetting":  # all, at some tokens beside others with little decay
        inputs.a_log.fill_(5)
        inputs.dt_bias.zero_()
        inputs.a[:] = torch.where(torch.rand(inputs.a.shape) < 0.1, 1e4, -6.0)


HARD = ["random", "equal keys", "similar keys", "strong decay", "forgetting"]


@pytest.mark.usefixtures("has_bf16")
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_blocks_compute_what_tokens_do(
    device: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks against the kernels that go from token to token. One product with operands rounded to
    bfloat16 once would be off by 1e-3, and with equal keys by 1e-1.
    """
    lens = [1, 130]
    inputs = make_inputs(lens, SMALL, dtype)
    make_hard(inputs, kind)
    found, state = run(inputs, lens, device)
    monkeypatch.setattr(import_module("gllm_engine.ops.triton.gated_delta"), "LONG", 1 << 30)
    expected, then = run(inputs, lens, device)
    limit = 2e-5 if dtype == torch.float32 else 3e-4
    assert found.isfinite().all()
    assert off(found, expected) < (limit if dtype == torch.float32 else 3e-3)
    assert torch.equal(state.conv, then.conv)
    assert off(state.matrix, then.matrix) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_true_sizes(dtype: torch.dtype) -> None:
    """Heads of Qwen3.5's sizes on a GPU, against float32's token by token."""
    lens = [1, 1, 15, 16, 300, 129]
    inputs = make_inputs(lens, (2, 4, 128, 128, 4), dtype)
    found, state = run(inputs, lens, "cuda")
    wide = Inputs(*(t if t.dtype == torch.int64 else t.float() for t in inputs))
    expected, then = run_twin(wide, lens)
    assert off(found, expected) < 1e-2
    assert torch.equal(state.conv.float(), then.conv)
    assert off(state.matrix, then.matrix) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_may_be_cut_anywhere(device: str) -> None:
    inputs = make_inputs([90], SMALL)
    whole, after = run(inputs, [90], device)
    found = []
    first = 0
    for count in (68, 3, 18, 1):
        tokens = slice(first, first + count)
        part = inputs._replace(qkv=inputs.qkv[tokens], b=inputs.b[tokens], a=inputs.a[tokens])
        out, state = run(part, [count], device)
        inputs = inputs._replace(conv_state=state.conv, matrix=state.matrix)
        found.append(out)
        first += count
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs.conv_state, after.conv, rtol=0, atol=0)
    torch.testing.assert_close(inputs.matrix, after.matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device: str) -> None:
    lens = [1, 16, 70, 20, 3]
    inputs = make_inputs(lens, SMALL)
    clean, before = run(inputs, lens, device)
    own = slice(17, 87)
    for tensor in (inputs.qkv[own], inputs.a[own], inputs.b[own]):
        tensor[5] = torch.nan
    inputs.matrix[inputs.slots[2]] = torch.nan
    found, after = run(inputs, lens, device)
    assert found[own].isnan().all()
    others = torch.ones(sum(lens), dtype=torch.bool)
    others[own] = False
    assert torch.equal(found[others], clean[others])
    slots = torch.arange(len(inputs.matrix)) != inputs.slots[2]
    assert torch.equal(after.matrix[slots], before.matrix[slots])
    assert torch.equal(after.conv[slots], before.conv[slots])


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton")
def test_blocks_are_of_long_rows() -> None:
    plan_rows = import_module("gllm_engine.ops.triton.gated_delta").plan_rows
    starts, blocks = plan_rows([1, 1, 15, 16, 200, 2, 64], CPU)
    assert starts.tolist() == [0, 1, 2, 17, 33, 233, 235, 299]
    assert blocks.rows.tolist() == [3, 4, 4, 4, 4, 6]
    assert blocks.firsts.tolist() == [0, 0, 0, 0, 1, 5, 5]
    assert blocks.long.tolist() == [3, 4, 6] and blocks.has_short
    assert not plan_rows([64, 65], CPU)[1].has_short
    starts, blocks = plan_rows([1, 15], CPU)
    assert starts.tolist() == [0, 1, 16] and blocks is None


@pytest.mark.parametrize("device", DEVICES)
def test_the_gated_norm_is_its_twin(device: str) -> None:
    from gllm_engine.ops.triton.gated_delta import gated_norm

    x, gain = torch.randn(5, 3, 24), torch.rand(24)
    gate = torch.randn(5, 3 * 24 + 7)[:, 7:].unflatten(1, (3, 24))
    found = gated_norm(x.to(device), gain.to(device), 1e-5, gate.to(device))
    expected = reference.gated_norm(x, gain, 1e-5, gate)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
