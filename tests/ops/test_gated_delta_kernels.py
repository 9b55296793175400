"""The kernels of the gated delta rule against their slow twin, interpreted or on a GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from gllm_engine.ops import RecurrentState, reference

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")),
]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
# k_heads, v_heads, k_dim, v_dim, taps
SHAPES = [(2, 4, 16, 32, 4), (1, 3, 24, 40, 3), (2, 2, 8, 8, 2)]
ROWS = {"decode": [1, 1, 1], "chunks": [5, 1, 2, 17], "both": [1, 1, 9]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_are_their_twin(
    device: str, rows: str, shape: tuple[int, int, int, int, int]
) -> None:
    from gllm_engine.ops.triton.gated_delta import gated_delta

    k_heads, v_heads, k_dim, v_dim, taps = shape
    lens = ROWS[rows]
    num_tokens, width = sum(lens), 2 * k_heads * k_dim + v_heads * v_dim
    num_slots = 7
    # States have the stride of a whole sequence's state, which is larger.
    conv_state = torch.randn(num_slots, 3, width, taps - 1)[:, 1]
    matrix = torch.randn(num_slots, 2, v_heads, k_dim, v_dim)[:, 1]
    packed = torch.randn(num_tokens, width + 2 * v_heads + 3)
    qkv, b, a, _ = packed.split((width, v_heads, v_heads, 3), 1)
    a = a * 10  # on both sides of softplus' bend
    conv = torch.randn(width, taps)
    a_log, dt_bias = torch.rand(v_heads), torch.randn(v_heads)
    slots = torch.randperm(num_slots)[: len(lens)]
    starts = torch.tensor([0, *lens]).cumsum(0).int()

    def to(*tensors: Tensor) -> list[Tensor]:
        """Copies with the same strides."""
        return [torch.empty_strided(t.shape, t.stride(), device=device).copy_(t) for t in tensors]

    there = RecurrentState(*to(conv_state, matrix))
    found = gated_delta(
        *to(qkv, b, a, conv, a_log, dt_bias), there, slots.to(device), starts.to(device)
    )
    num_decode = next((i for i, n in enumerate(lens) if n > 1), len(lens))
    plan = reference.RowPlan(slots, lens, num_decode)
    state = RecurrentState(conv_state, matrix)
    expected = reference.gated_delta(qkv, b, a, conv, a_log, dt_bias, state, plan)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there.conv.cpu(), conv_state, rtol=0, atol=0)
    torch.testing.assert_close(there.matrix.cpu(), matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gated_norm_is_its_twin(device: str) -> None:
    from gllm_engine.ops.triton.gated_delta import gated_norm

    x, gain = torch.randn(5, 3, 24), torch.rand(24)
    gate = torch.randn(5, 3 * 24 + 7)[:, 7:].unflatten(1, (3, 24))
    found = gated_norm(x.to(device), gain.to(device), 1e-5, gate.to(device))
    expected = reference.gated_norm(x, gain, 1e-5, gate)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
