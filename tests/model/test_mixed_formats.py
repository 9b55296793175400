"""Checkpoints of compressed-tensors with several formats: the file says which one a weight has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import Tensors, check, compressed, mixed, refusal, rewrite, set_config, write
from safetensors.torch import load_file
from test_uneven_shares import on_all_ranks
from tiny_models import CPU, all_logits, load, some_tokens
from torch import Tensor

from gllm_engine.arch import LoadError, read_arch
from gllm_engine.model import Decoder, fill_randomly
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops import PackedWeight

FILE = "model.safetensors"
PACKED = {"format": "pack-quantized"}
INT4 = compressed("group", num_bits=4, type="int", group_size=32) | PACKED
INT8 = compressed("group", num_bits=8, type="int", group_size=32) | PACKED
BLOCKS = compressed("block", block_structure=[32, 32])
ROWS = compressed("channel")

# Family, config, how many weights have which kind of numbers, the size of a block.
CASES: list[tuple[str, dict[str, Any], dict[str, int], tuple[int, int]]] = [
    # Attention in FP8, experts in INT4.
    ("Qwen3MoeForCausalLM", mixed(BLOCKS, INT4), {"F8": 8, "4": 48}, (32, 32)),
    ("DeepseekV32ForCausalLM", mixed(INT4, BLOCKS), {"F8": 20, "4": 24}, (32, 32)),
    # Attention in INT8, which is held plain; older files name the format once.
    (
        "Glm4MoeForCausalLM",
        mixed(INT4, INT8, form="pack-quantized"),
        {"8": 14, "4": 24},
        (0, 0),
    ),
    ("Qwen3ForCausalLM", mixed(ROWS, INT4), {"F8": 8, "4": 6}, (1, 0)),
]


def kinds(model: Path) -> Counter[str]:
    found = Counter[str]()
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            found["F8"] += 1
        elif name.endswith("_packed"):
            scales = tensors[name.removesuffix("_packed") + "_scale"]
            found[str(tensor.shape[1] // scales.shape[1])] += 1  # int32 of 32 columns
    return found


@pytest.mark.parametrize(("family", "config", "counts", "size"), CASES)
def test_weights_of_two_formats(
    tmp_path: Path,
    family: str,
    config: dict[str, Any],
    counts: dict[str, int],
    size: tuple[int, int],
) -> None:
    model = write(tmp_path / "model", family, config)
    assert kinds(model) == counts
    check(model, size)


def test_layers_whose_experts_differ(tmp_path: Path) -> None:
    """Experts of one layer in INT4, and of another in FP8, whatever a list of targets says."""
    config = mixed(INT4, BLOCKS)
    model = write(tmp_path / "model", "Qwen3MoeForCausalLM", config)
    other = load_file(write(tmp_path / "other", "Qwen3MoeForCausalLM", BLOCKS) / FILE)
    place = "model.layers.1.mlp.experts."

    def exchange(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(place)]:
            del tensors[name]
        tensors.update({n: tensor for n, tensor in other.items() if n.startswith(place)})

    rewrite(model, exchange)
    assert kinds(model) == {"F8": 8 + 24, "4": 24}
    check(model, (32, 32))


def test_a_format_that_no_group_has(tmp_path: Path) -> None:
    model = write(tmp_path, "Qwen3MoeForCausalLM", mixed(BLOCKS, INT4))
    names = [
        f"model.layers.{i}.self_attn.{own}_proj.weight_scale" for i in range(2) for own in "qkvo"
    ]
    rewrite(model, lambda t: t.update({n: torch.tensor(0.1) for n in names}))
    set_config(model, mixed(ROWS, INT4))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert refusal(model) == (
        f"{model / FILE}: tensor {name} is FP8 with one scale, but the config's "
        "quantization_config says FP8 with a scale per row and INT4 with a scale per 32 columns"
    )


def exchange_ups(model: Path, other: Path, expert: int | None = None) -> None:
    """Give experts of layer 0, or one, the up_proj of another checkpoint, for one in INT4."""
    theirs = load_file(other / FILE)

    def exchange(tensors: Tensors) -> None:
        for i in range(8) if expert is None else (expert,):
            module = f"model.layers.0.mlp.experts.{i}.up_proj."
            for end in ("weight_packed", "weight_scale"):
                del tensors[module + end]
            tensors.update({n: t for n, t in theirs.items() if n.startswith(module)})

    rewrite(model, exchange)


def test_what_no_layer_holds(tmp_path: Path) -> None:
    """All experts are one product."""
    model = write(tmp_path / "model", "Qwen3MoeForCausalLM", mixed(BLOCKS, INT4))
    exchange_ups(model, write(tmp_path / "other", "Qwen3MoeForCausalLM", BLOCKS), expert=1)
    message = "but that of an earlier expert is INT4 with a scale per 32 columns; all"
    with pytest.raises(LoadError, match=message):
        load(model)


@pytest.mark.parametrize("config", [BLOCKS, None])
def test_gate_and_up_that_differ_are_held_plain(
    tmp_path: Path, config: dict[str, Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    family = "Qwen3MoeForCausalLM"
    size = {"moe_intermediate_size": 64}
    model = write(tmp_path / "model", family, mixed(BLOCKS, INT4), **size)
    other = tmp_path / "other"
    if config is None:
        write_tiny_model(other, family, seed=4, **size)
    else:
        write(other, family, config, **size)
    exchange_ups(model, other)
    decoder = load(model)
    assert isinstance(decoder._blocks[0]._ffn._gate_up, Tensor)
    assert isinstance(decoder._blocks[0]._ffn._down, PackedWeight)
    assert isinstance(decoder._blocks[1]._ffn._gate_up, PackedWeight)
    told = "INT4 with a scale per 32 columns, held plain (model.layers.0.mlp.experts.gate_proj."
    assert told in caplog.text
    check(model, (32, 32))
    expected = all_logits(decoder, some_tokens(24))
    for logits in on_all_ranks(model, 2, lambda decoder: all_logits(decoder, some_tokens(24))):
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", [0, 2])
def test_made_up_weights(tmp_path: Path, case: int) -> None:
    family, config, _, _ = CASES[case]
    arch = read_arch(write(tmp_path, family, config)).quantized()
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
    fill_randomly(decoder)
    logits = all_logits(decoder, some_tokens(20))
    assert logits.isfinite().all() and logits.std() > 0.05
    assert all_logits(load(tmp_path), some_tokens(20)).std() > 0.05
