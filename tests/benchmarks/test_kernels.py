"""The cases of the kernel benchmark: they run, and count the bytes and operations there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import approx

from gllm_benchmarks.kernels import FORMS, Shape, describe, make_row, seconds_of
from gllm_benchmarks.offline import MODELS
from gllm_benchmarks.ours import kind_of
from gllm_engine import write_tiny_model
from gllm_engine.arch import Moe, make_arch, read_arch
from gllm_engine.arch.formats import FP8_TENSOR, Int8
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.ops import Fp8Weight, Int8Weight


@pytest.fixture
def shape(tmp_path: Path) -> Shape:
    """Tiny, with norms of query and key heads."""
    write_tiny_model(tmp_path, "Qwen3ForCausalLM")
    return Shape(read_arch(tmp_path), torch.device("cpu"), torch.float32, torch.float32)


class Counted(Shape):
    """Of a full size, for the arithmetic alone: nothing of that size is made."""

    def attention(self, batch, attends=True):  # type: ignore[no-untyped-def]
        return lambda: None


def llama(cache_dtype: torch.dtype = torch.bfloat16) -> Counted:
    arch = read_arch(MODELS / "llama-3.1-8b")
    return Counted(arch, torch.device("cpu"), torch.bfloat16, cache_dtype)


def test_all_cases_run(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"TOKENS": (1, 5), "GEMM_TOKENS": (1, 3, 2000), "FP8_TOKENS": (3,), "ROWS": (1, 4)}
    small |= {"DECODE": ((1, 40), (3, 17)), "PREFILL": ((2, 33, 33), (2, 40, 7)), "REPLAYS": 1}
    for name, value in small.items():
        monkeypatch.setattr(f"gllm_benchmarks.kernels.{name}", value)
    found = []
    for case in shape.cases():
        seconds = seconds_of(case, shape.device)
        assert seconds > 0 and case.bytes > 0
        found.append(describe(case, seconds))
    # Logits are made for sampled rows only, never for 2,000.
    assert len(found) == 2 * 3 + 2 + 2 + 2 + (3 * 5 - 1) + 3 * 4
    kernels = {about["kernel"] for about in found}
    assert kernels == {
        "rms_norm", "silu_mul", "rotate_and_store", "sample", "attention, decode",
        "attention, prefill", "GEMM qkv", "GEMM out", "GEMM gate_up", "GEMM down", "GEMM logits",
        *(f"{form} {name}" for form in FORMS for name in shape.matrices),
    }  # fmt: skip
    assert all(len(make_row(about)) == 7 for about in json.loads(json.dumps(found)))


def test_experts_are_cases_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path, "Qwen3MoeForCausalLM")
    shape = Shape(read_arch(tmp_path), torch.device("cpu"), torch.float32, torch.float32)
    small = {"TOKENS": (1,), "GEMM_TOKENS": (1,), "ROWS": (1,), "DECODE": (), "PREFILL": ()}
    small |= {"FP8_TOKENS": ()}
    for name, value in (small | {"MOE_TOKENS": (1, 9), "REPLAYS": 1}).items():
        monkeypatch.setattr(f"gllm_benchmarks.kernels.{name}", value)
    cases = list(shape.cases())
    assert all(seconds_of(case, shape.device) > 0 for case in cases)
    gemms = ["GEMM qkv", "GEMM out", "GEMM logits"]
    kernels = ["rms_norm", "rotate_and_store", "sample", *gemms, "experts", "experts"]
    assert [case.kernel for case in cases] == kernels


def test_one_scale_is_copied_to_all_rows(shape: Shape) -> None:
    """As layers hold it: which kernel multiplies depends on it."""
    for kind in (FP8_TENSOR, Int8(rows=0)):
        weight = shape.weight(kind, 32, 64)
        assert isinstance(weight, Fp8Weight | Int8Weight)
        assert weight.rows_per_scale == 1 and weight.scales.shape == (32, 1)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
KINDS_OF_WEIGHTS = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, "GPTQ INT4", 0.5 + 2 / 32),
    ({"quant_method": "awq", "bits": 4, "group_size": 32}, "AWQ INT4", 0.5 + 4 / 32),
    ({"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True}, None, 4),  # held plain
    ({"quant_method": "fp8"}, "FP8 with one scale", 1),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": INT4}}}
        | {"format": "pack-quantized"},
        "INT4 with",
        0.5 + 2 / 32,
    ),
]


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize(("config", "told", "number"), KINDS_OF_WEIGHTS)
def test_products_are_those_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    config: dict[str, Any],
    told: str | None,
    number: float,
) -> None:
    monkeypatch.setattr("gllm_benchmarks.kernels.REPLAYS", 1)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_experts_per_tok": 2}
    arch = make_arch(tiny_config(family, quantization_config=config, **size)).quantized()
    shape = Shape(arch, torch.device("cpu"), torch.float32, torch.float32)
    for case in shape.gemm_cases(3):
        assert seconds_of(case, shape.device) > 0
        name, _, kind = case.kernel.removeprefix("GEMM ").partition(", ")
        experts_only = isinstance(shape.ffn, Moe) and "config_groups" in config
        plain = name == "logits" or experts_only or told is None
        assert kind == "" if plain else kind.startswith(str(told))
        rows, columns = (shape.matrices | {"logits": (384, 64)})[name]
        moved = 3 * (columns + rows * (1 + (name in ("out", "down")))) * 4
        assert case.bytes == moved + rows * columns * (4 if plain else number)
    # Of one token: with the norm before them, the activation after them, and the rows left so.
    assert all(seconds_of(case, shape.device) > 0 for case in shape.gemm_cases(1))
    if isinstance(shape.ffn, Moe):
        case = shape.moe_case(shape.ffn, 10**6)  # all experts
        rest = (shape.ffn.num_experts * 64 + 3 * 10**6 * 64) * 4
        numbers = 3 * shape.ffn.num_experts * shape.ffn.hidden * 64
        assert case.bytes - rest == approx(numbers * number)
        assert seconds_of(shape.moe_case(shape.ffn, 3), shape.device) > 0


def test_the_gated_delta_rule_is_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path, "Qwen3_5ForCausalLM")
    shape = Shape(read_arch(tmp_path), torch.device("cpu"), torch.float32, torch.float32)
    monkeypatch.setattr("gllm_benchmarks.kernels.REPLAYS", 1)
    assert shape.delta is not None
    decode, prefill = (shape.delta_case(shape.delta, *size) for size in ((3, 1), (2, 20)))
    assert decode.kernel.endswith("decode") and prefill.kernel.endswith("prefill")
    assert all(seconds_of(case, shape.device) > 0 for case in (decode, prefill))
    delta = shape.delta
    matrices = delta.v_heads * delta.k_dim * delta.v_dim
    state = 4 * (matrices + delta.conv_width * (delta.conv - 1))
    token = 4 * (delta.conv_width + delta.v_heads * (delta.v_dim + 2))
    assert (decode.bytes, decode.ops) == (3 * (2 * state + token), 3 * 6 * matrices)
    assert prefill.bytes == 2 * (2 * state + 20 * token) and prefill.ops > 40 * 6 * matrices


def test_latent_attention_in_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path, "DeepseekV3ForCausalLM")
    shape = Shape(read_arch(tmp_path), torch.device("cpu"), torch.float32, torch.float32)
    small = {"LATENT_DECODE": ((3, 17),), "LATENT_PREFILL": ((2, 33, 33), (2, 40, 7)), "REPLAYS": 1}
    for name, value in small.items():
        monkeypatch.setattr(f"gllm_benchmarks.kernels.{name}", value)
    cases = list(shape.cases())
    assert all(seconds_of(case, shape.device) > 0 for case in cases)
    forms = [case.kernel.removeprefix("latent attention, ") for case in cases]
    assert forms == ["absorbed"] + 2 * ["absorbed", "expanded"]
    assert [case.size for case in cases[1:4]] == ["2 x 33", "2 x 33", "2 x 7 after 33"]


def test_operations_of_latent_attention() -> None:
    arch = read_arch(MODELS / "deepseek-v2-lite")
    shape = Counted(arch, torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    pairs = 2 * (64 * 65 // 2)
    absorbed = shape.latent_case(2, 64, 64, True)
    assert absorbed.ops == 2 * 16 * (pairs * (576 + 512) + 128 * 256 * 512)
    expanded = shape.latent_case(2, 64, 64, False)
    assert expanded.ops == 2 * 16 * (pairs * (192 + 128) + 128 * 256 * 512)
    moved = 128 * (576 + 16 * (192 + 128)) + 16 * 256 * 512  # W_UK and W_UV are read once
    assert expanded.bytes == 2 * moved == absorbed.bytes


def test_experts_read_what_is_chosen() -> None:
    arch = read_arch(MODELS / "qwen3-30b-a3b")
    shape = Counted(arch, torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    one, many = (shape.moe_case(shape.ffn, tokens) for tokens in (1, 16384))
    expert, router = 3 * 768 * 2048, 128 * 2048
    assert one.bytes == 2 * (8 * expert + router + 3 * 2048)
    assert many.bytes == approx(2 * (128 * expert + router + 3 * 16384 * 2048))
    assert many.ops == 2 * 16384 * (8 * expert + router)
    assert many.floor_s == approx(1.58e-3, rel=1e-2)  # bound by arithmetic


@pytest.mark.parametrize("rows", [[(40, 1), (33, 1), (7, 1)], [(33, 33), (16, 16)], [(40, 7)]])
def test_steps_are_what_the_product_would_run(shape: Shape, rows: list[tuple[int, int]]) -> None:
    batch = shape.batch(rows)
    assert batch.num_decode == (3 if len(rows) == 3 else 0)
    counts = [-(-context // 16) for context, _ in rows]
    own = [batch.page_table[row, :count].tolist() for row, count in enumerate(counts)]
    assert sorted(sum(own, [])) == list(range(sum(counts)))  # no page is in two places
    first = 0
    for row, (context, num) in enumerate(rows):
        positions = list(range(context - num, context))
        assert batch.positions[first : first + num].tolist() == positions
        places = [own[row][p // 16] * 16 + p % 16 for p in positions]
        assert batch.cache_index[first : first + num].tolist() == places
        first += num
    out = shape.attention(batch)()()
    assert out.shape == (first, shape.mixer.heads * shape.mixer.head_dim) and out.isfinite().all()


def test_decode_attention_reads_k_and_v_once() -> None:
    case = llama().attention_case(512, 1536)
    kv, rest = 512 * 1536 * 2 * 8 * 128, 512 * 2 * 32 * 128 * 2
    assert case.bytes == kv * 2 + rest
    assert case.floor_s == approx(0.749e-3 + 2e-6, rel=5e-3)
    assert describe(case, 0.746e-3)["share"] == approx(1.0, abs=0.01)
    assert llama(torch.float8_e4m3fn).attention_case(512, 1536).bytes == kv + rest


def test_prefill_attention_is_causal() -> None:
    case = llama().attention_case(2, 8192, 8192)
    assert case.ops == 4 * 32 * 128 * 2 * 8192 * 8193 / 2
    assert case.ops / 1.684e-3 == approx(653e12, rel=2e-3)  # what FA3 was measured at
    late = llama().attention_case(1, 8192, 2048)
    assert late.ops == 4 * 32 * 128 * sum(range(8192 - 2048 + 1, 8193))
    assert late.size == "1 x 2048 after 6144"
    # Over a float8 cache Q, K and V have a byte a number, and products have twice the speed.
    small = llama(torch.float8_e4m3fn).attention_case(1, 8192, 2048)
    assert late.bytes - small.bytes == (8192 * 2 * 8 + 2048 * 32) * 128
    assert small.floor_s == approx(late.floor_s / 2)


def test_products_and_norms() -> None:
    products = {case.kernel: case for case in llama().gemm_cases(1)}
    gate_up = products["GEMM gate_up"]
    assert gate_up.ops == 2 * 28672 * 4096 and gate_up.size == "1 x 4096 x 28672"
    assert gate_up.floor_s == approx(54.6e-6, rel=1e-3)  # one token: the weight's bytes
    # All weights on a token's way: 8.03 billion parameters but for the embedding.
    layers = sum(c.ops / 2 for name, c in products.items() if name != "GEMM logits")
    assert 32 * layers + products["GEMM logits"].ops / 2 == approx(7.5e9, rel=1e-2)
    (out,) = (case for case in llama().gemm_cases(64) if case.kernel == "GEMM out")
    assert out.bytes == 2 * (4096 * 4096 + 64 * 3 * 4096)  # its sum is read and written
    norm, activation, store = llama().rows_cases(1024)
    assert norm.bytes == (2 * 1024 + 1) * 4096 * 2
    assert activation.bytes == 3 * 1024 * 14336 * 2
    assert store.bytes == 1024 * (2 * 48 * 128 * 2 + 512)
    assert llama().sample_case(512).bytes == 512 * 128256 * 2


def test_kinds_of_kernels_in_a_profile() -> None:
    """The first kind with a pattern that is in the kernel's name."""
    kinds = {
        "_choose_tokens": "indexer",
        "_gather_latents": "attention",
        "_solve_blocks": "gated delta rule",
        "_grouped": "experts",
        "_packed": "GEMM",
    }
    assert {kernel: kind_of(kernel) for kernel in kinds} == kinds
