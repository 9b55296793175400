"""Weights derived from a spec are those of transformers, for full-size configs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from gllm_engine.arch import make_arch
from gllm_engine.arch.names import checkpoint_tensors

LARGE: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Mistral-7B": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen3-32B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "Mixtral-8x7B": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
    "Qwen1.5-MoE-A2.7B": {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"},
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "head_dim": 128,
        "norm_topk_prob": True,
    },
    "DeepSeek-V3.2": {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "num_hidden_layers": 4,
    },
    "GLM-5": {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "num_hidden_layers": 4,
    },
    "Qwen3-Next-80B-A3B": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 8,
        "num_experts": 64,
    },
    "Qwen3.5-27B": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 48,
    },
    "glm-4-9b": {"architectures": ["GlmForCausalLM"], "model_type": "glm"},
    "GLM-4-0414": {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"},
}


@pytest.mark.parametrize("name", LARGE)
def test_weights_are_those_of_transformers(name: str) -> None:
    values = LARGE[name]
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        reference = getattr(transformers, values["architectures"][0])(config)
    arch = make_arch(values)
    parameters = [*reference.named_parameters(), *buffers_of(reference)]
    assert arch.num_params() == sum(p.numel() for _, p in parameters)
    shapes, expected = arch.weights(), {}
    for tensor, weights in checkpoint_tensors(arch).items():
        rows = sum(shapes[weight][0] for weight in weights)
        expected[tensor] = (rows, *shapes[weights[0]][1:])
    assert expected == per_expert(iter(parameters), values["architectures"][0])


def buffers_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those that a checkpoint has."""
    named = model.named_buffers()
    return [(name, b) for name, b in named if name.endswith("e_score_correction_bias")]


def per_expert(
    parameters: Iterator[tuple[str, torch.Tensor]], family: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as published checkpoints have them, where transformers stacks experts."""
    moe, parts = "mlp.", ("gate_proj", "up_proj", "down_proj")
    if family.startswith("Mixtral"):
        moe, parts = "block_sparse_moe.", ("w1", "w3", "w2")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in parameters:
        name, shape = name.replace("mlp.", moe), tuple(parameter.shape)
        if ".experts." not in name:
            shapes[name] = shape
            continue
        stem, _, stacked = name.rpartition(".")
        width = shape[1] // 2 if stacked == "gate_up_proj" else shape[1]
        for part in parts[:2] if stacked == "gate_up_proj" else parts[2:]:
            names = [f"{stem}.{expert}.{part}.weight" for expert in range(shape[0])]
            shapes |= dict.fromkeys(names, (width, shape[2]))
    return shapes
