"""The memory of states: rows and layers do not touch each other."""

from __future__ import annotations

import torch

from gllm_engine.arch import make_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.model.states import States, bytes_of_states

KINDS = ["linear_attention", "full_attention", "linear_attention"]
ODD = {"linear_value_head_dim": 7, "linear_key_head_dim": 3, "linear_num_key_heads": 1}


def test_rows_and_layers_are_apart() -> None:
    over = {"num_hidden_layers": 3, "layer_types": KINDS} | ODD
    config = tiny_config("Qwen3_5ForCausalLM", **over)
    layers = make_arch(config).layers
    states = States(layers, 4, torch.bfloat16, torch.device("cpu"))
    assert states.layers.keys() == {0, 2}
    assert states.flat.shape == (4, bytes_of_states(layers, torch.bfloat16))
    number = 0
    parts = [part for state in states.layers.values() for part in state]
    for part in parts:
        assert part.dtype in (torch.bfloat16, torch.float32)
        for row in range(4):
            number += 1
            part[row] = number
    states.copy(1, 3)
    states.clear(0)
    for i, part in enumerate(parts):
        assert [set(part[row].flatten().tolist()) for row in range(4)] == [
            {0.0},
            {4.0 * i + 2},
            {4.0 * i + 3},
            {4.0 * i + 2},
        ]
