"""Triton's compiler takes every kernel of a model's steps, though no GPU is here to run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from every_expert import usual_heads

from gllm_engine.arch.tiny import tiny_config

# With every kind of attention, of expert, of norm and of activation.
FAMILIES = (
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo3ForCausalLM",
    "GPTBigCodeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "DeepseekV32ForCausalLM",
    "GptOssForCausalLM",
    "Llama4ForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3MoeForCausalLM",
)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
QUANTIZED = {
    "Qwen3ForCausalLM": AWQ,
    "Llama4ForCausalLM": AWQ,
    "Olmo3ForCausalLM": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
        "ignore": ["lm_head"],
    },
    "Qwen3NextForCausalLM": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"weights": INT8, "input_activations": INT8}},
    },
    "GptOssForCausalLM": {"quant_method": "mxfp4"},
    "Qwen3MoeForCausalLM": {"quant_method": "fp8"},
    "Gemma2ForCausalLM": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "Glm4MoeLiteForCausalLM": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
# Heads of true sizes, for kernels whose use of registers and shared memory depends on them.
SIZES = {
    "Qwen3NextForCausalLM": {
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    # Experts' sizes that whole blocks divide, here and below.
    "DeepseekV32ForCausalLM": {"hidden_size": 256, "moe_intermediate_size": 128},
    # Of a rank of DeepSeek V3, too.
    "Glm4MoeLiteForCausalLM": {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
}
UNSPILLED = set(
    """
    _absorb _attend_latent _convolve_blocks _project _recur _recur_blocks _solve_blocks
    """.split()
)
# And so every kernel that a single GPU runs, whatever the model.
KERNELS = set(
    """
    _absorb _activate _apply_sinks _attend_latent _choose _choose_tokens _convolve
    _convolve_blocks _count _decode_attention _dequantize _dequantize_packed
    _few_down _few_gate_up _gated_norm _gather_latents _gemv _grouped _grouped_blocks
    _layer_norm _list_pages _look _mean_squares _packed _place _project _quantize _recur
    _recur_blocks _rescale _rms_norm _rotate_and_store _route _score_tokens _skinny
    _solve_blocks _sort_few _split _store_index_key _store_latent _sum
    """.split()
)


@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """What is as it was in an earlier run, the compiler included, comes from Triton's cache, which
    has the same code: it goes by a digest of all that the code depends on.
    """
    for family in FAMILIES:
        (tmp_path / family).mkdir()
        config = tiny_config(family, **usual_heads(family) | SIZES.get(family, {}))
        if family in QUANTIZED:
            config["quantization_config"] = QUANTIZED[family]
        (tmp_path / family / "config.json").write_text(json.dumps(config))
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, here / "compile_offline.py", *(tmp_path / f for f in FAMILIES)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == KERNELS
    blocks = {shared for name, _, shared, _ in lines if name == "_grouped_blocks"}
    assert len(blocks) == 2  # with scales, and of 16-bit numbers without
    assert {stack for name, *_, stack in lines if name in UNSPILLED} == {"0"}
    # Its heads stay in the registers of the threads that load them.
    assert {shared for name, _, shared, _ in lines if name == "_rotate_and_store"} == {"0"}
