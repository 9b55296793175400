"""A float8 KV cache: what is stored and what is attended to, against naive float8_e4m3fn."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from naive_attention import attention
from patience import SCRIPT_S
from test_reference import CHUNKS, DECODE, HEAD_DIM, make_case
from torch import Tensor

from gllm_engine.ops import AttentionInputs, reference

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive_numbers() -> Tensor:
    """The numbers that float8_e4m3fn has, from 0 to the largest, as its definition gives them."""
    codes = [divmod(code, 8) for code in range(127)]
    numbers = [(8 + m if e else m) * 2.0 ** (e - 10 if e else -9) for e, m in codes]
    return torch.tensor(numbers, dtype=torch.float64)


def naive_round(x: Tensor) -> Tensor:
    """The nearest of them in float64, of two as near the one whose last bit is 0; NaN stays."""
    numbers = naive_numbers()
    gaps = (x.double().abs().clamp(max=1e6)[..., None] - numbers).abs()
    nearest = gaps == gaps.amin(-1, keepdim=True)
    code = (nearest * (2 - torch.arange(127) % 2)).argmax(-1)
    return torch.where(x.isnan(), torch.nan, numbers[code].copysign(x.double()))


def hard_cases(dtype: torch.dtype, count: int) -> Tensor:
    """Every number of float8, what lies halfway between two, what is beyond all; then anything."""
    numbers = naive_numbers()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    beyond = torch.tensor([448.5, 464, 465, 480, 3e4, torch.inf, torch.nan, 2.0**-10, 2.0**-11])
    cases = torch.cat((numbers, halfway, beyond.double()))
    cases = torch.cat((cases, -cases))
    more = torch.randn(count - len(cases), generator=torch.Generator().manual_seed(2))
    return torch.cat((cases, more * 2.0 ** torch.linspace(-12, 12, len(more)))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored(dtype: torch.dtype) -> None:
    batch, kv, cache = make_case([(70, 64)], page_size=4, kv_heads=2)
    kv = hard_cases(dtype, kv.numel()).view(kv.shape)
    stored = cache.to(FLOAT8)
    reference.write_kv(stored, kv, reference.plan_attention(batch, stored, None, dtype))
    page, offset = batch.cache_index // 4, batch.cache_index % 4
    expected = cache.to(FLOAT8).double()
    expected[page, :, offset] = naive_round(kv)
    assert expected[page, :, offset].abs().nan_to_num().max() == 448
    torch.testing.assert_close(stored.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", [None, 1, 15])
@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reads_what_is_stored(
    dtype: torch.dtype, page_size: int, window: int | None
) -> None:
    torch.manual_seed(0)  # how far off unrounded numbers are depends on the queries
    batch, kv, cache = make_case(DECODE + CHUNKS, page_size, kv_heads=2)
    cache, kv = cache.to(FLOAT8), kv.to(dtype)
    q = torch.randn(len(batch.tokens), 4, HEAD_DIM).to(dtype)
    plan = reference.plan_attention(batch, cache, window, dtype)
    reference.write_kv(cache, kv, plan)
    out = reference.attend(AttentionInputs(q), cache, plan)
    assert out.dtype == dtype
    expected = attention(q, cache, batch, window)
    limit = 2e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=limit)
    # Unrounded K and V would not have given that.
    wide = cache.to(torch.float32)
    page, offset = batch.cache_index // page_size, batch.cache_index % page_size
    wide[page, :, offset] = kv.float()
    assert (attention(q, wide, batch, window) - expected).abs().max() > 2 * limit


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_that_stores() -> None:
    """In Triton's interpreter, which a process has for all kernels or for none."""
    script = Path(__file__).with_name("interpreted_float8.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ended = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=SCRIPT_S
    )
    assert ended.returncode == 0, ended.stderr
