"""Sizes of ranks that are known without a device are those of a start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gllm_engine.arch import FAMILIES, Model, make_arch, read_arch
from gllm_engine.arch.model import GatedDelta
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.config import ConfigError, EngineConfig, settle
from gllm_engine.model import Decoder
from gllm_engine.ops.kernels import SCORE_BYTES
from gllm_engine.runner import PeakMemory, kv_sizing
from gllm_engine.workers.build_runner import shard_of
from gllm_engine.workers.estimate import estimate

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
SMALL: dict[str, Any] = {
    "model": "/",
    "dtype": "bfloat16",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
}


def small(**over: Any) -> EngineConfig:
    return settle(EngineConfig(**SMALL | over), 80 << 30, 0)


def real_decoder(
    config: EngineConfig, arch: Model, cut: tuple[int, ...] | None = None, stage: int = 0
) -> Decoder:
    """What the first rank of a stage builds, but on a CPU."""
    return Decoder(
        arch,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        max_model_len=config.max_model_len or arch.max_len,
        shard=shard_of(config, cut or (len(arch.layers),), stage),
    )


def bytes_of(decoder: Decoder) -> int:
    return sum(weight.nbytes for weight in decoder.weights().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_weights_and_can_be_sized(family: str) -> None:
    arch = make_arch(tiny_config(family))
    config = small()
    found = estimate(config, arch, 8 * GIB)
    (stage,) = found.stages
    decoder = real_decoder(config, arch)
    assert sum(stage.weights.values()) == bytes_of(decoder)
    assert found.num_pages > 1000 and stage.total <= 8 * GIB
    page_bytes = decoder.page_bytes(config.page_size, torch.bfloat16)
    assert stage.kv_cache == found.num_pages * page_bytes
    # A step holds the widest input of a layer, the logits, an indexer's scores, and not much more.
    chooses = any(getattr(layer.mixer, "indexer", None) is not None for layer in arch.layers)
    assert 2 * GIB < stage.step < 2.5 * GIB + chooses * SCORE_BYTES
    assert all(text for use in found.kernels for text in use.kernels.values())


def test_stages_have_whole_runs_of_layers() -> None:
    """Layers that use the choice of an earlier one are in its stage, and store no index keys."""
    types = ["full", "full", "shared", "shared", "full", "shared"]
    over = {"num_hidden_layers": 6, "indexer_types": types}
    arch = make_arch(tiny_config("GlmMoeDsaForCausalLM", **over))
    found = estimate(small(pipeline_parallel_size=2), arch, 8 * GIB)
    assert [stage.first_layer for stage in found.stages] in ([0, 1], [0, 4])
    parts = {use.part: use.layers for use in found.kernels}
    latents = "latent attention, 4 heads, latents of 48, "
    assert parts[f"{latents}own choice of 12 tokens"] == 3
    assert parts[f"{latents}an earlier layer's choice of 12 tokens"] == 3
    dense = 32 + 16  # of a token in a layer: the latent and the rotated key
    for stage in found.stages:
        kinds = types[stage.first_layer : stage.last_layer + 1]
        width = len(kinds) * dense + kinds.count("full") * 24
        assert stage.kv_cache == found.num_pages * 16 * 2 * width


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_float8_weights_take_half(family: str) -> None:
    blocks = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    arch = make_arch(tiny_config(family, quantization_config=blocks)).quantized()
    found = estimate(small(), arch, 8 * GIB)
    (stage,) = found.stages
    assert sum(stage.weights.values()) == bytes_of(real_decoder(small(), arch))
    plain = estimate(small(), make_arch(tiny_config(family)), 8 * GIB).stages[0].weights
    kind = "experts" if "experts" in plain else "feed-forward"
    assert 0.5 < stage.weights[kind] / plain[kind] < 0.51
    (use,) = [use for use in found.kernels if "FP8 in blocks of 32 x 32" in use.part]
    assert use.kernels["hopper"].startswith("Triton") and use.kernels["cpu"] == "plain torch"


GPTQ = {"quant_method": "gptq", "group_size": 128, "desc_act": False, "sym": True}


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 0.25, 0.28), (8, 1, 1.01)])
def test_whole_numbers_take_a_quarter_or_are_held_plain(
    bits: int, least: float, most: float
) -> None:
    size = {"hidden_size": 128, "moe_intermediate_size": 128}
    config = size | {"quantization_config": GPTQ | {"bits": bits}}
    arch = make_arch(tiny_config("Qwen3MoeForCausalLM", **config)).quantized()
    found = estimate(small(), arch, 8 * GIB)
    (stage,) = found.stages
    plain = make_arch(tiny_config("Qwen3MoeForCausalLM", **size))
    experts = estimate(small(), plain, 8 * GIB).stages[0].weights["experts"]
    assert least <= stage.weights["experts"] / experts <= most
    (use,) = [use for use in found.kernels if f"GPTQ INT{bits}" in use.part]
    assert ("held plain" in use.part) == (bits == 8)
    assert use.kernels["cpu"] == "plain torch"


def test_products_with_a_format_are_told_once_wherever_ranks_cut_it() -> None:
    size = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3}
    whole_rows = GPTQ | {"bits": 4, "group_size": -1}
    config = tiny_config("LlamaForCausalLM", quantization_config=whole_rows, **size)
    found = estimate(small(tensor_parallel_size=2), make_arch(config).quantized(), 8 * GIB)
    (use,) = [use for use in found.kernels if "GPTQ" in use.part]
    assert use.layers == 3 and use.kernels["cpu"] == "plain torch"
    assert use.kernels["hopper"].startswith("Triton; for more than 512 rows cuBLAS, with")


def test_layers_that_keep_a_state_are_sized() -> None:
    arch = make_arch(tiny_config("LlamaForCausalLM"))
    delta = GatedDelta(k_heads=2, v_heads=4, k_dim=16, v_dim=16, conv=4)
    mixed = (replace(arch.layers[0], mixer=delta), *arch.layers[1:])
    arch = replace(arch, layers=mixed)
    found = estimate(small(num_snapshots=3), arch, 8 * GIB)
    (stage,) = found.stages
    each = 4 * (4 * 16 * 16) + 2 * (2 * 2 * 16 + 4 * 16) * 3
    assert (stage.states, stage.snapshots) == (5 * each, 3 * each)
    more = estimate(small(), arch, 8 * GIB)
    assert more.num_snapshots == kv_sizing.fitting_snapshots(
        small(), real_decoder(small(), arch), more.num_pages
    )
    assert any("gated delta" in use.part for use in more.kernels)


@pytest.mark.parametrize("over", [{}, {"kv_cache_gib": 0.01}, {"num_pages": 77}])
def test_a_cpu_has_the_pages_of_a_start(over: dict[str, Any]) -> None:
    arch = make_arch(tiny_config("Gemma2ForCausalLM"))
    config = small(**over)
    found = estimate(config, arch, None)
    assert found.num_pages == kv_sizing.fitting_pages(config, real_decoder(config, arch), None)
    assert found.stages[0].step == found.stages[0].driver == 0


def test_the_first_rank_has_the_most_weights() -> None:
    """Of 9 groups of 32 channels, 8 ranks have 2, 1, 1, ..."""
    size = {"intermediate_size": 288, "num_attention_heads": 8, "num_key_value_heads": 8}
    mxfp4 = {"quantization_config": {"quant_method": "mxfp4"}}
    arch = make_arch(tiny_config("GptOssForCausalLM", **size, **mxfp4)).quantized()
    config = small(tensor_parallel_size=8)
    (stage,) = estimate(config, arch, 8 * GIB).stages
    held = []
    for rank in range(8):
        options = {"dtype": torch.bfloat16, "device": torch.device("meta"), "max_model_len": 64}
        decoder = Decoder(arch, shard=shard_of(config, (2,), 0, rank), **options)
        held.append(sum(decoder.weight_bytes().values()))
    assert sum(stage.weights.values()) == held[0]
    assert len(set(held[1:])) == 1 and held[1] < 0.75 * held[0]


@pytest.mark.parametrize("tie", [False, True])
def test_the_first_rank_has_the_most_of_the_vocabulary(tie: bool) -> None:
    """Of 389 tokens, 4 ranks have 104, 104, 104 and 77."""
    arch = make_arch(tiny_config("LlamaForCausalLM", vocab_size=389, tie_word_embeddings=tie))
    (stage,) = estimate(small(tensor_parallel_size=4), arch, 8 * GIB).stages
    kinds = ["embeddings"] if tie else ["embeddings", "output projection"]
    assert [stage.weights.get(kind) for kind in kinds] == [2 * 104 * arch.dim] * len(kinds)
    assert stage.kv_cache > 3 * GIB


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "LlamaForCausalLM"])
def test_ranks_have_their_shares(family: str) -> None:
    arch = make_arch(tiny_config(family, num_hidden_layers=5))
    config = small(tensor_parallel_size=2, pipeline_parallel_size=2, assigned_layers="2,3")
    found = estimate(config, arch, 8 * GIB)
    assert [(s.first_layer, s.last_layer) for s in found.stages] == [(0, 1), (2, 4)]
    for number, stage in enumerate(found.stages):
        decoder = real_decoder(config, arch, (2, 3), number)
        assert sum(stage.weights.values()) == bytes_of(decoder)
        page_bytes = decoder.page_bytes(config.page_size, torch.bfloat16)
        assert stage.kv_cache == found.num_pages * page_bytes
    first, last = found.stages
    assert "embeddings" in first.weights and "embeddings" not in last.weights
    assert "output projection" in last.weights and "output projection" not in first.weights


def test_a_rank_reserves_its_share_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of decode graphs, on the last stage only; the trial step has made all others."""
    monkeypatch.setattr(kv_sizing, "_trial", lambda *_: kv_sizing.StepBytes(0, 0))
    arch = make_arch(tiny_config("LlamaForCausalLM", vocab_size=389))
    steps = {}
    for size in (1, 4):
        config = small(tensor_parallel_size=size, pipeline_parallel_size=2)
        steps[size] = [stage.step for stage in estimate(config, arch, 8 * GIB).stages]
    partials = {1: 4 * 4 * 64, 4: 4 * 4 * 16}  # float32, of 4 sequences
    assert steps[1] == [2 * GIB + partials[1], 2 * GIB + partials[1] + 4 * 2 * 389]
    assert steps[4] == [2 * GIB + partials[4], 2 * GIB + partials[4] + 4 * 2 * 104]


def test_the_cut_is_even_in_bytes() -> None:
    arch = make_arch(tiny_config("LlamaForCausalLM", num_hidden_layers=6, vocab_size=384))
    found = estimate(small(pipeline_parallel_size=3), arch, 8 * GIB)
    assert [s.last_layer - s.first_layer + 1 for s in found.stages] == [2, 2, 2]
    wide = make_arch(tiny_config("LlamaForCausalLM", num_hidden_layers=6, vocab_size=8192))
    found = estimate(small(pipeline_parallel_size=3), wide, 8 * GIB)
    assert found.stages[-1].first_layer == 5  # beside the output projection


def test_no_room() -> None:
    arch = make_arch(tiny_config("LlamaForCausalLM"))
    with pytest.raises(ConfigError, match=r"^gpu_memory_utilization: 0.9 of 1.0 GiB leaves no"):
        estimate(small(), arch, GIB)
    with pytest.raises(ConfigError, match=r"^num_pages: a KV cache of .* a GPU has 8\.0"):
        estimate(small(num_pages=10**8), arch, 8 * GIB)
    with pytest.raises(ConfigError, match=r"^kv_cache_gib: a KV cache of 6\.0 GiB does not fit"):
        estimate(small(kv_cache_gib=6.0), arch, 8 * GIB)


def test_a_float8_cache_has_twice_the_pages() -> None:
    arch = make_arch(tiny_config("LlamaForCausalLM", head_dim=64))
    plain = estimate(small(), arch, 32 * GIB)
    float8 = estimate(small(kv_cache_dtype="fp8"), arch, 32 * GIB)
    assert float8.num_pages / plain.num_pages == pytest.approx(2, rel=1e-2)
    hopper = [found.kernels[0].kernels["hopper"] for found in (plain, float8)]
    assert hopper[0].endswith("FlashInfer fa3; short chunks after the first one: fa2")
    assert hopper[1].endswith("rounded to FP8; short chunks after the first one: fa2")
    others = [found.kernels[0].kernels["gpu"] for found in (plain, float8)]
    assert others[0] == others[1] and others[0].endswith("FlashInfer fa2")
    gemma = make_arch(tiny_config("Gemma2ForCausalLM", head_dim=64))
    capped = estimate(small(kv_cache_dtype="fp8"), gemma, 32 * GIB).kernels[0].kernels
    assert capped["hopper"].endswith("FlashInfer fa3; chunks after the first one: fa2")


def measured(name: str) -> dict[str, Any]:
    """The figures of our engine on an H200."""
    file = ROOT / f"benchmarks/results/offline-{name}.json"
    recorded = json.loads(file.read_text())
    assert recorded["hardware"].startswith("1 x NVIDIA H200")
    figures: dict[str, Any] = recorded["figures"]["ours"]
    return figures


def test_an_estimate_is_near_what_a_gpu_had() -> None:
    path = ROOT / "benchmarks/models/llama-3.1-8b"
    figures = measured(path.name)
    config = settle(EngineConfig(model=str(path), **figures["config"]), 80 << 30, 0)
    found = estimate(config, read_arch(path), int(139.8 * GIB))
    assert found.num_pages * config.page_size == pytest.approx(figures["kv_tokens"], rel=0.03)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    meta = torch.device("meta")
    before = torch.zeros(100, device=meta)
    with torch.inference_mode(), PeakMemory() as memory:
        a = torch.zeros(10, 10, device=meta)
        b = a.view(-1)[:50]  # a view
        before.add_(1)  # memory of the time before
        c, d = torch.ones(8, 4, device=meta).chunk(2)
        assert memory.now == 400 + 128
        del a, c, d
        assert memory.now == 400, "a view keeps all its memory"
        b = torch.cat([b, b])
        assert (memory.now, memory.peak) == (400, 800)
        torch.zeros(1000)  # not on the device
    assert memory.peak == 800 and b.numel() == 100


def test_an_encoder_has_the_tower_and_ranks_do_not() -> None:
    arch = make_arch(tiny_config("Qwen3VLForConditionalGeneration"))
    sizes = {"image_cache_tokens": 4096}
    inside = estimate(small(**sizes), arch, 8 * GIB)
    apart = estimate(small(**sizes, encoder_workers=2), arch, 8 * GIB)
    assert inside.encoder is None and apart.encoder is not None
    tower = inside.stages[0].weights.pop("vision tower")
    assert apart.stages[0].weights == inside.stages[0].weights
    # What encoders have on the ranks' GPUs is left free there, as at a start.
    assert apart.stages[0].encoders == 2 * (GIB // 2) and inside.stages[0].encoders == 0
    usable = 8 * GIB * small().gpu_memory_utilization
    assert usable - (64 << 20) < apart.stages[0].total <= usable
    halves = estimate(
        small(**sizes, encoder_workers=2, pipeline_parallel_size=2), arch, 8 * GIB
    ).stages
    assert [stage.encoders for stage in halves] == [GIB, 0]
    # The zeros at the ends of its rows are no weights, but they take memory.
    tower += inside.stages[0].tables - apart.stages[0].tables
    assert apart.encoder.weights == tower
    assert tower < apart.encoder.step < 1 * GIB == apart.encoder.driver
    found = estimate(small(**sizes, encoder_workers=2), arch, None)
    on_cpu = found.encoder
    assert on_cpu is not None and (on_cpu.weights, on_cpu.total) == (tower, tower)
    assert found.stages[0].encoders == 0
    assert arch.vision is not None
    wide = replace(arch, vision=replace(arch.vision, hidden=4096))
    too_large = small(num_pages=10, image_cache_tokens=2**20, encoder_workers=1)
    with pytest.raises(ConfigError, match=r"encoder_workers: an encoder takes .* \(image_cache_"):
        estimate(too_large, wide, 8 * GIB)
