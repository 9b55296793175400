"""A script for TRITON_INTERPRET=1: the store to a float8 cache against its slow twin, bit for bit.

Numbers are ones that float8_e4m3fn has, or lie beyond them: the interpreter rounds in its own way
and knows no NaN there. Rounding is tested on a GPU, in test_gpu_kernels.py.
"""

from __future__ import annotations

import os

import torch

from gllm_engine.ops import PagedPlan, RotaryInputs, reference

assert os.environ["TRITON_INTERPRET"] == "1"
from gllm_engine.ops import triton  # noqa: E402

HEADS, KV_HEADS, DIM, PAGE, TOKENS = 3, 2, 16, 4, 5
FLOAT8 = torch.float8_e4m3fn


def bits(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8)


def check(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 256, (TOKENS, HEADS + 2 * KV_HEADS, DIM), dtype=torch.uint8)
    qkv = codes.view(FLOAT8).to(dtype).nan_to_num(nan=1.0) + 0.0  # no negative zeros
    qkv[::2, :, ::5] = torch.tensor([449, 460, -3e4, 6e4]).to(dtype)
    qkv[1, -KV_HEADS:, 3] = torch.inf  # in V: rotation would make NaN of it in K
    cache = torch.randint(0, 127, (4, 2, PAGE, KV_HEADS, DIM), dtype=torch.uint8).view(FLOAT8)
    places, found = torch.tensor([2, 15, 4, 8, 7]), cache.clone()
    plan = reference.ReferencePlan(places, [], [])
    ones, zeros, positions = torch.ones(9, DIM // 2), torch.zeros(9, DIM // 2), torch.arange(TOKENS)
    q, kept = triton.rotate_and_store(
        *(qkv, HEADS, None, RotaryInputs(ones, zeros, False, positions), found),
        PagedPlan(places, keeps=True),
    )
    rotary = reference.rotary_inputs(ones, zeros, positions, dtype, False)
    before = bits(cache).clone()
    expected = reference.rotate_and_store(*(qkv.clone(), HEADS, None, rotary, cache, plan))
    assert torch.equal(q, expected.q)
    if dtype == torch.float32:  # no kernel attends with such heads rounded
        assert torch.equal(kept, qkv[:, HEADS:])
    else:
        assert torch.equal(bits(kept), bits(qkv.clamp(-448, 448).to(FLOAT8)))
    assert torch.equal(bits(found), bits(cache)) and not torch.equal(before, bits(cache))
    assert found.float().abs().max() == 448


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check(dtype)
