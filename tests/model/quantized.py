"""Writes quantised checkpoints, and undoes their formats in the plainest way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CPU, all_logits, load, reference_logits, some_tokens
from torch import Tensor

from gllm_engine.arch import Model, read_arch
from gllm_engine.model import Decoder, LoadError, filling, open_checkpoint
from gllm_engine.model.tiny import write_tiny_model

TOLERANCE = 2e-5
FP8 = torch.float8_e4m3fn
Tensors = dict[str, Tensor]
BESIDE = (".qzeros", ".scales", "g_idx", "_zero_point", "_shape")  # beside whole numbers


def block(rows: int, columns: int) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": [rows, columns], "fmt": "e4m3"}


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False}
    weights |= {"symmetric": True} | more
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return config | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def write(path: Path, family: str, config: dict[str, Any], **over: Any) -> Path:
    return write_tiny_model(path, family, seed=3, quantization_config=config, **over)


def by_hand(numbers: Tensor, scales: Tensor, size: tuple[int, int]) -> Tensor:
    """Each number times the scale of its block."""
    out = numbers.float()
    rows = size[0] or out.shape[0]
    columns = size[1] or out.shape[1]
    scales = scales.float().reshape(-(-out.shape[0] // rows), -(-out.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            out[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] *= scales[i, j]
    return out


def packed_numbers(words: Tensor, bits: int, awq: bool = False) -> Tensor:
    """[n * 32 / bits, m], of int32 [n, m] that hold numbers of a column."""
    per_word = 32 // bits
    # Where AWQ has the numbers 0, 1, 2.. of a word.
    places = [0, 4, 1, 5, 2, 6, 3, 7] if awq else range(per_word)
    rows = []
    for word in words.long() % 2**32:
        rows += [word // 2 ** (bits * place) % 2**bits for place in places]
    return torch.stack(rows)


def whole_numbers(module: str, stored: Tensors, config: dict[str, Any]) -> Tensor:
    """The weight [out, in] of `module`, of which the checkpoint has GPTQ's or AWQ's tensors."""
    bits = config["bits"]
    awq = config["quant_method"] == "awq"
    qweight, qzeros = stored[module + "qweight"], stored[module + "qzeros"].long() % 2**32
    scales = stored[module + "scales"].float()
    if config.get("checkpoint_format") == "gptq":
        qzeros = qzeros + sum(2**shift for shift in range(0, 32, bits))
    zeros = packed_numbers(qzeros.T, bits, awq).T
    if awq:
        numbers = packed_numbers(qweight.T, bits, awq).T
        groups = torch.arange(len(numbers)) // (len(numbers) // len(scales))
    else:
        numbers = packed_numbers(qweight, bits)
        groups = stored[module + "g_idx"].long()
    return ((numbers - zeros[groups]) * scales[groups]).T.contiguous()


def mixed(*groups: dict[str, Any], form: str = "mixed-precision") -> dict[str, Any]:
    """What `groups` promise, each alone, in one config, as published checkpoints have it."""
    each = {
        f"group_{i}": group["config_groups"]["group_0"] | {"format": group["format"]}
        for i, group in enumerate(groups)
    }
    return groups[0] | {"format": form, "config_groups": each}


def bits_of(packed: Tensor, scales: Tensor, config: dict[str, Any]) -> int:
    """Of the whole numbers of a weight, by the int32 of a group."""
    for group in config["config_groups"].values():
        weights = group["weights"]
        words = (weights.get("group_size") or 0) * weights["num_bits"] // 32
        if weights["type"] == "int" and packed.shape[1] == words * scales.shape[1]:
            return int(weights["num_bits"])
    return 4


def four_bits(name: str, stored: Tensors, bits: int = 4) -> Tensor:
    """The weight `name`, of which the checkpoint has packed numbers, of 4 bits or of other."""
    if name + "_packed" in stored:
        packed, scales = stored[name + "_packed"], stored[name + "_scale"].float()
        numbers = packed_numbers(packed.T, bits).T
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if name + "_zero_point" in stored:
            zeros = packed_numbers(stored[name + "_zero_point"], bits)
        columns = numbers.shape[-1]
        in_order = torch.arange(columns) // (columns // scales.shape[-1])
        groups = stored.get(name + "_g_idx", in_order).long()
        zeros, scales = zeros[:, groups], scales[:, groups]
        return ((numbers - zeros) * scales).contiguous()
    blocks, exponents = stored[name + "_blocks"], stored[name + "_scales"].float() - 127
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack((blocks % 16, blocks // 16), -1).flatten(-2)
    return (values[codes.long()] * 2 ** exponents[..., None]).flatten(-2)


def unquantized(model: Path, path: Path, size: tuple[int, int]) -> Path:
    """A copy of the checkpoint in which every weight is plain."""
    path.mkdir()
    for file in model.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    tensors: Tensors = {}
    stored = load_file(model / "model.safetensors")
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scales = stored[name + "_scale"]
            tensors[name] = by_hand(tensor, scales, (int(scales.numel() > 1), 0))
        elif tensor.dtype == FP8:
            (scales,) = (stored[n] for n in stored if n.startswith(name + "_scale"))
            tensors[name] = by_hand(tensor, scales, size)
        elif name.endswith("_packed"):
            weight = name.removesuffix("_packed")
            bits = bits_of(tensor, stored[weight + "_scale"], quantization)
            tensors[weight] = four_bits(weight, stored, bits)
        elif name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            tensors[weight] = four_bits(weight, stored)
            if tensors[weight].dim() == 3:  # gpt-oss stores plain ones as [experts, columns, rows]
                tensors[weight] = tensors[weight].mT.contiguous()
        elif name.endswith(".qweight"):
            module = name.removesuffix("qweight")
            weight = whole_numbers(module, stored, quantization)
            # GPT-2 stores plain ones as [columns, rows].
            tensors[module + "weight"] = weight.T.contiguous() if ".c_" in module else weight
        elif not name.endswith(BESIDE) and "_scale" not in name:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def rewrite(model: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {name: t.clone() for name, t in load_file(model / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def refusal(model: Path) -> str:
    with pytest.raises(LoadError) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(model: Path, size: tuple[int, int] = (0, 0)) -> None:
    tokens = some_tokens(40)
    ours = all_logits(load(model), tokens)
    theirs = reference_logits(unquantized(model, model.with_name("plain"), size), tokens)
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def load_held(model: Path, hold: Callable[[Model], Model], **more: Any) -> Decoder:
    with open_checkpoint(read_arch(model), model) as checkpoint:
        options = {"dtype": torch.float32, "device": CPU, "max_model_len": 64} | more
        decoder = Decoder(hold(checkpoint.arch), **options)
        with filling(decoder, checkpoint):
            return decoder


def set_config(model: Path, config: dict[str, Any]) -> None:
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
