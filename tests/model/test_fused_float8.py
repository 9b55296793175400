"""FP8 experts of a layer in one tensor, as published checkpoints have them: logits are those of
transformers for the exact numbers that are stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import (
    FP8,
    TOLERANCE,
    Tensors,
    block,
    by_hand,
    compressed,
    load_held,
    refusal,
    rewrite,
    write,
)
from safetensors.torch import load_file, save_file
from tiny_models import CPU, all_logits, load, reference_logits, some_tokens
from torch import Tensor

from gllm_engine.arch import Model, Shard, read_arch
from gllm_engine.model import Decoder, filling, open_checkpoint
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops import dequantized
from gllm_engine.parallel import TensorParallel

MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
TRANSPOSED = "Llama4ForCausalLM"
STACKED = "Qwen3_5MoeForConditionalGeneration"
EXPERTS = 8


def quantize(weight: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(numbers, scales) of a matrix, with a scale for each block of `size`; 0: all."""
    rows, columns = size[0] or weight.shape[0], size[1] or weight.shape[1]
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    numbers = torch.empty(weight.shape, dtype=FP8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[at].abs().max() / 448
            numbers[at] = (weight[at] / scales[i, j]).to(FP8)
    return numbers, scales


def fuse(
    model: Path,
    config: dict[str, Any],
    size: tuple[int, int],
    scales_of: Callable[[Tensor], Tensor],
    suffix: str,
    halves: bool = False,
) -> Path:
    """Store the experts of a plain checkpoint in FP8; returns a copy with their exact numbers.

    `scales_of`: of [experts, rows, columns] scales, what is stored. `halves`: gate and up have
    scales of their own.
    """
    plain = model.with_name("plain")
    plain.mkdir()
    for file in model.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    tensors = load_file(model / "model.safetensors")
    exact = dict(tensors)
    is_transposed = "text_config" not in values
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "down_proj"))]:
        if ".experts." not in name or tensors[name].dim() != 3:
            continue
        stack = tensors[name].mT if is_transposed else tensors[name]
        numbers, scales, right = [], [], []
        for matrix in stack:
            parts = matrix.chunk(2) if halves and "gate_up" in name else [matrix]
            each = [quantize(part, size) for part in parts]
            numbers.append(torch.cat([n for n, _ in each]))
            scales.append(torch.cat([s for _, s in each]))
            right.append(torch.cat([by_hand(n, s, size) for n, s in each]))
        stored, exact[name] = torch.stack(numbers), torch.stack(right)
        told = torch.stack(scales)
        if is_transposed:
            stored, exact[name], told = stored.mT, exact[name].mT, told.mT
        tensors[name], exact[name] = stored.contiguous(), exact[name].contiguous()
        tensors[name + suffix] = scales_of(told).contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    return plain


def as_is(scales: Tensor) -> Tensor:
    return scales


# Family, config, size of a block, what is stored of the scales, their suffix, whether gate and up
# have scales of their own.
LAYOUTS: dict[str, tuple[str, dict[str, Any], tuple[int, int], Callable[..., Any], str, bool]] = {
    "fbgemm": (TRANSPOSED, FBGEMM, (1, 0), as_is, "_scale", False),
    # As transformers has the scales of `down`, which is the same memory.
    "fbgemm, upright": (TRANSPOSED, FBGEMM, (1, 0), lambda s: s.mT, "_scale", False),
    "rows": (STACKED, compressed("channel"), (1, 0), as_is, "_scale", False),
    "rows, flat": (STACKED, compressed("channel"), (1, 0), lambda s: s[..., 0], "_scale", False),
    "expert": (TRANSPOSED, MODELOPT, (0, 0), as_is, "_weight_scale", False),
    "expert, flat": (STACKED, MODELOPT, (0, 0), lambda s: s.flatten(), "_scale_inv", False),
    "gate and up": (STACKED, MODELOPT, (0, 0), as_is, "_scale_inv", True),
    "gate and up, transposed": (TRANSPOSED, MODELOPT, (0, 0), as_is, "_scale", True),
    "blocks": (STACKED, block(16, 16), (16, 16), as_is, "_scale_inv", False),
    "blocks over gate and up": (STACKED, block(24, 16), (24, 16), as_is, "_scale_inv", False),
    "these, transposed": (TRANSPOSED, block(40, 32), (40, 32), as_is, "_scale_inv", False),
    "blocks, transposed": (TRANSPOSED, block(16, 32), (16, 32), as_is, "_scale_inv", False),
}


def plain_model(path: Path, family: str) -> Path:
    over = {"intermediate_size": 32} if family == TRANSPOSED else {}
    return write_tiny_model(path, family, seed=3, **over)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits(tmp_path: Path, name: str) -> None:
    family, config, size, scales_of, suffix, halves = LAYOUTS[name]
    model = plain_model(tmp_path / "model", family)
    plain = fuse(model, config, size, scales_of, suffix, halves)
    stored = load_file(model / "model.safetensors")
    assert sum(tensor.dtype == FP8 for tensor in stored.values()) in (2, 4)
    decoder, tokens = load(model), some_tokens(40)
    ours = all_logits(decoder, tokens)
    assert any(view.dtype == FP8 for view in decoder.weights().values())
    theirs = all_logits(load(plain), tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert theirs.std() > 1
    if family == TRANSPOSED:
        expected = reference_logits(plain, tokens)
        torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
    held_plain = all_logits(load_held(model, Model.widened), tokens)
    torch.testing.assert_close(held_plain, ours, rtol=0, atol=TOLERANCE)
    # Every scale has an effect of its own.
    scales = [key for key in stored if key.endswith(suffix) and ".experts." in key]
    for key in scales:
        rewrite(model, lambda tensors, key=key: tensors[key].view(-1)[1:].mul_(1.5))
        assert (all_logits(load(model), tokens) - ours).abs().max() > 1e-3
        rewrite(model, lambda tensors, key=key: tensors[key].copy_(stored[key]))


def test_one_scale_of_all_experts(tmp_path: Path) -> None:
    """As ModelOpt stores Llama 4, beside the scales of inputs, and with a text model's names."""
    model = write_tiny_model(tmp_path / "model", "Llama4ForConditionalGeneration", seed=3)
    tensors = load_file(model / "model.safetensors")
    exact = dict(tensors)
    for name in [
        name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]:
        scale = tensors[name].abs().max() / 448
        numbers = (tensors[name] / scale).to(FP8)
        exact[name] = numbers.float() * scale
        tensors |= {name: numbers, name + "_weight_scale": scale, name + "_input_scale": 2 * scale}
    save_file(exact, model / "model.safetensors")
    expected = all_logits(load(model), some_tokens(40))
    save_file(
        {n.removeprefix("language_model."): t for n, t in tensors.items()},
        model / "model.safetensors",
    )
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"quantization_config": MODELOPT}))
    found = all_logits(load(model), some_tokens(40))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["Llama4ForCausalLM", "Llama4ForConditionalGeneration"])
def test_experts_one_by_one(tmp_path: Path, family: str) -> None:
    """As compressed-tensors stores Llama 4, also without a promise in the config."""
    model = write(tmp_path / "model", family, compressed("channel"))
    names = load_file(model / "model.safetensors").keys()
    assert any(name.endswith("feed_forward.experts.7.gate_proj.weight_scale") for name in names)
    logits = all_logits(load(model), some_tokens(20))
    values = json.loads((model / "config.json").read_text())
    del values.get("text_config", values)["quantization_config"]
    (model / "config.json").write_text(json.dumps(values))
    assert torch.equal(all_logits(load(model), some_tokens(20)), logits)


@pytest.mark.parametrize(
    "name", ["fbgemm", "expert", "gate and up, transposed", "blocks", "blocks, transposed"]
)
@pytest.mark.parametrize("apart", [False, True])
def test_ranks_hold_parts_of_the_whole(tmp_path: Path, name: str, apart: bool) -> None:
    family, config, size, scales_of, suffix, halves = LAYOUTS[name]
    model = plain_model(tmp_path / "model", family)
    plain = fuse(model, config, size, scales_of, suffix, halves)
    for rank in range(2):
        gate_up, down = held_experts(model, rank, apart)
        plain_gate_up, plain_down = held_experts(plain, rank, apart)
        torch.testing.assert_close(gate_up, plain_gate_up, rtol=0, atol=1e-6)
        torch.testing.assert_close(down, plain_down, rtol=0, atol=1e-6)


def held_experts(path: Path, rank: int, apart: bool) -> tuple[Tensor, Tensor]:
    with open_checkpoint(read_arch(path), path) as checkpoint:
        shard = Shard(1, 2, rank, 2, apart)
        ranks = TensorParallel(rank, 2, CPU, None, True)
        options = {"dtype": torch.float32, "device": CPU, "max_model_len": 64}
        decoder = Decoder(checkpoint.arch, shard=shard, ranks=ranks, **options)
        with filling(decoder, checkpoint):
            pass
    ffn = decoder._blocks[0]._ffn
    return dequantized(ffn._gate_up, torch.float32), dequantized(ffn._down, torch.float32)


def test_what_is_refused(tmp_path: Path) -> None:
    family, config, size, scales_of, suffix, _ = LAYOUTS["rows"]
    model = plain_model(tmp_path / "model", family)
    fuse(model, config, size, scales_of, suffix)
    whole = load_file(model / "model.safetensors")
    name = next(name for name in whole if name.endswith("layers.1.mlp.experts.gate_up_proj"))
    wrong: list[tuple[Tensors, str]] = [
        (
            {name + "_scale": torch.ones(EXPERTS, 3, 1)},
            f"{name} [8, 64, 64] are [], one scale, [8, 1, 1], one per expert, [8, 64, 1], one per "
            "row, and [8, 1, 1], one per block of 128 x 128",
        ),
        ({name + "_weight_scale": torch.ones(1)}, f"and several of {name}_weight_scale, {name}"),
        ({name + "_scale": torch.ones(EXPERTS, 64).int()}, "has dtype I32; supported: "),
        ({name + "_input_scale": torch.ones(3)}, f"{name}_input_scale is left over"),
    ]
    for tensors, message in wrong:
        save_file(whole | tensors, model / "model.safetensors")
        assert message in refusal(model)
    del whole[name + "_scale"]
    save_file(whole, model / "model.safetensors")
    assert f"and none of {name}_weight_scale, {name}_scale_inv, {name}_scale; one" in refusal(model)


def test_interleaved_experts(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, "GptOssForCausalLM", seed=3)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rewrite(model, lambda t: t.update({name: t[name].to(FP8), name + "_scale": torch.ones(1)}))
    assert "not supported for a tensor that is stored transposed or interleaved" in refusal(model)
