"""Kernels that read float8 numbers have each of them exactly, and NaN stays NaN: in Triton's
interpreter, which knows no NaN of float8, or on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES
from torch import Tensor

from gllm_engine.ops import Fp8Weight

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = 127  # a code; another one is 255


def every_number(device: str) -> Tensor:
    """[256] by code, but zeros for NaN in the interpreter."""
    codes = torch.arange(256, dtype=torch.uint8)
    if device == "cpu":
        codes[codes % 128 == NAN] = 0
    return codes.view(FLOAT8)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def one_row(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A page table, the slot and the length of a context of one token, which is in page 1."""
    table = torch.ones(1, 1, dtype=torch.int32, device=device)
    return table, torch.zeros(1, dtype=torch.int64, device=device), torch.ones_like(table[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_copies_of_latents(device: str, dtype: torch.dtype) -> None:
    from gllm_engine.ops import triton

    numbers = every_number(device)
    expected = numbers.to(dtype)
    latents = torch.zeros(1, 192, dtype=dtype, device=device)
    k = torch.zeros(1, 2, 64, dtype=dtype, device=device)
    place = torch.zeros(1, dtype=torch.int64, device=device)
    triton.gather_latents(numbers.view(1, 1, 1, 1, 256).to(device), place, latents, k)
    same(latents[0], expected[:192])
    same(k[0], expected[192:].expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_attention_to_one_token_is_its_v(device: str, dtype: torch.dtype) -> None:
    from gllm_engine.ops import triton

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("numpy, which interprets kernels, has no bfloat16")
    cache = torch.zeros(2, 2, 16, 2, 128).to(FLOAT8)
    cache[1, 1, 0] = every_number(device).view(2, 128)
    table, slots, lens = one_row(device)
    plan = triton.split_kv(table, slots, lens, 2, None)
    q = torch.ones(1, 8, 128, dtype=dtype, device=device)
    out = triton.decode_attention(q, cache.to(device), plan).cpu()
    same(out, cache[1, 1, 0].to(dtype).repeat_interleave(4, 0)[None])
    if device == "cuda":
        cache.view(torch.uint8)[1, 0, 0, 1, 77] = NAN  # of K
        out = triton.decode_attention(q, cache.to(device), plan)
        assert out[0, 4:].isnan().all() and out[0, :4].isfinite().sum() == 4 * 127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_attention_to_one_latent_is_that_latent(device: str, dtype: torch.dtype) -> None:
    from gllm_engine.ops import triton

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("numpy, which interprets kernels, has no bfloat16")
    heads, rank, rope = 4, 256, 16
    cache = torch.zeros(2, 1, 16, 1, rank + rope).to(FLOAT8)
    latent = every_number("cpu")
    cache[1, 0, 0, 0, :rank] = latent
    eye = torch.eye(rank, dtype=dtype).repeat(heads, 1, 1)
    kv_up = torch.cat((torch.zeros(heads, 16, rank, dtype=dtype), eye), 1).to(device)
    table, slots, lens = one_row(device)
    splits = triton.split_latents(table, slots, lens, heads)
    q = torch.ones(1, heads, 16 + rope, dtype=dtype, device=device)
    out = torch.zeros(1, heads, rank, dtype=dtype, device=device)
    triton.attend_latent(q, kv_up, cache.to(device), splits, 0.1, out)
    same(out[0], latent.to(dtype).expand(heads, -1))
    if device == "cuda":
        cache.view(torch.uint8)[1, 0, 0, 0, 200] = NAN
        triton.attend_latent(q, kv_up, cache.to(device), splits, 0.1, out)
        assert out.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("tokens", [1, 9, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_of_an_expert_stays_in_its_row(dtype: torch.dtype, tokens: int, columns: int) -> None:
    from gllm_engine.ops import triton

    def weight(width: int, depth: int) -> Fp8Weight:
        numbers = torch.randn(4, width, depth, device="cuda").to(FLOAT8)
        scales = torch.full((4, width // 128, depth // columns), 0.02, device="cuda")
        return Fp8Weight(numbers, scales, 128, columns)

    gate_up, down = weight(512, 256), weight(256, 256)
    down.numbers.view(torch.uint8)[2, 100, 3] = NAN
    x = torch.randn(tokens, 256, device="cuda").to(dtype)
    experts = torch.rand(tokens, 4, device="cuda").argsort(1)[:, :2].int().contiguous()
    weights = torch.rand(tokens, 2, device="cuda")
    found = triton.sum_experts(x, weights, experts, gate_up, down, 0, 4)
    expected = torch.zeros(tokens, 256, dtype=torch.bool, device="cuda")
    expected[:, 100] = (experts == 2).any(1)
    assert torch.equal(found.isnan(), expected)
