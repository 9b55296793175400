"""Checkpoints of compressed-tensors' int-quantized form: logits are those of transformers for the
exact numbers that are stored.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import Tensors, check, compressed, load_held, mixed, refusal, rewrite, write
from safetensors.torch import load_file
from test_uneven_shares import on_all_ranks
from tiny_models import CPU, all_logits, load, some_tokens
from torch import Tensor

from gllm_engine.arch import ArchError, Model, Moe, make_arch, read_arch
from gllm_engine.arch.formats import Int8, Widened
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.config import ConfigError
from gllm_engine.model import Decoder, fill_randomly, kernels_of
from gllm_engine.ops import Int8Weight
from gllm_engine.workers.build_runner import held_formats

INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16}


def int8(strategy: str = "channel", inputs: dict[str, Any] | None = INPUTS) -> dict[str, Any]:
    config = compressed(strategy, type="int") | {"format": "int-quantized"}
    config["config_groups"]["group_0"]["input_activations"] = inputs
    return config


CASES = [
    ("LlamaForCausalLM", int8(), {}),
    ("LlamaForCausalLM", int8("tensor"), {}),
    ("Qwen3ForCausalLM", int8(inputs=None), {}),
    ("Phi3ForCausalLM", int8(), {}),  # q, k and v are one tensor
    ("Phi3ForCausalLM", int8("tensor"), {}),
    ("Qwen2MoeForCausalLM", int8(), {"shared_expert_intermediate_size": 64}),
    ("DeepseekV3ForCausalLM", int8(), LATENT),
    ("Qwen3_5ForCausalLM", int8(), {}),
]


@pytest.mark.parametrize(("family", "config", "over"), CASES)
def test_logits_agree(
    tmp_path: Path, family: str, config: dict[str, Any], over: dict[str, Any]
) -> None:
    model = write(tmp_path / "model", family, config, **over)
    stored = load_file(model / "model.safetensors")
    assert sum(tensor.dtype == torch.int8 for tensor in stored.values()) >= 8
    check(model)


def held(decoder: Decoder, expert: bool = False) -> object:
    ffn = decoder._blocks[0]._ffn
    return ffn._down if expert else ffn._down.only_weight


def test_what_layers_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """int8 numbers, if inputs are rounded too; experts are always plain."""
    dense = write(tmp_path / "dense", "LlamaForCausalLM", int8())
    assert isinstance(held(load(dense)), Int8Weight) and not caplog.text
    assert isinstance(held(load_held(dense, Model.widened)), Tensor)
    weights = write(tmp_path / "weights", "LlamaForCausalLM", int8(inputs=None))
    assert isinstance(held(load(weights)), Tensor)
    experts = write(tmp_path / "experts", "Qwen3MoeForCausalLM", int8())
    with caplog.at_level(logging.WARNING):
        assert isinstance(held(load(experts), expert=True), Tensor)
    told = "unpacked INT8 with a scale per row, held plain (model.layers.1.mlp.experts."
    assert told in caplog.text
    formats = dict(load(experts).arch.layers[0].mixer.formats)
    assert set(formats.values()) == {Int8()}


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("LlamaForCausalLM", {"intermediate_size": 98}),
        ("Phi3ForCausalLM", {"head_dim": 16, "intermediate_size": 96}),
        ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 48}),
    ],
)
def test_ranks(tmp_path: Path, family: str, over: dict[str, Any], strategy: str) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = write(tmp_path, family, int8(strategy), **heads, **over)
    expected = all_logits(load(model), some_tokens(24))
    for logits in on_all_ranks(model, 2, lambda decoder: all_logits(decoder, some_tokens(24))):
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_beside_other_formats(tmp_path: Path) -> None:
    """Attention in FP8, and feed-forward matrices in int8, as two groups say."""
    config = mixed(compressed("channel"), int8())
    model = write(tmp_path / "model", "LlamaForCausalLM", int8())
    arch = read_arch(write(tmp_path / "other", "LlamaForCausalLM", config))
    assert set(map(str, arch.quantization)) == {
        "FP8 with a scale per row",
        "unpacked INT8 with a scale per row",
    }
    loaded = load(model, replace(arch, quantization=arch.quantization))
    assert torch.equal(all_logits(loaded, some_tokens(9)), all_logits(load(model), some_tokens(9)))


def test_scales_of_inputs_are_not_used(tmp_path: Path) -> None:
    static = INPUTS | {"strategy": "tensor", "dynamic": False, "symmetric": False}
    model = write(tmp_path, "LlamaForCausalLM", int8(inputs=static))
    right = all_logits(load(model), some_tokens(9))
    own = {
        f"model.layers.{i}.mlp.{name}_proj.{beside}": torch.ones(1)
        for i in range(2)
        for name in ("gate", "up", "down")
        for beside in ("input_scale", "input_zero_point")
    }
    rewrite(model, lambda tensors: tensors.update(own))
    assert torch.equal(all_logits(load(model), some_tokens(9)), right)


def test_every_stored_number_matters(tmp_path: Path) -> None:
    model = write(tmp_path, "LlamaForCausalLM", int8())
    right = all_logits(load(model), some_tokens(20))
    for own in ("weight", "weight_scale"):
        name = f"model.layers.1.mlp.up_proj.{own}"
        rewrite(model, lambda tensors, name=name: tensors.update({name: tensors[name].flip(0)}))
        other = all_logits(load(model), some_tokens(20))
        assert (other - right).abs().max() > 1e-3
        right = other


def test_made_up_weights() -> None:
    arch = make_arch(tiny_config("LlamaForCausalLM", quantization_config=int8())).quantized()
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
    fill_randomly(decoder)
    logits = all_logits(decoder, some_tokens(20))
    assert logits.isfinite().all() and logits.std() > 0.05
    uses = kernels_of(arch.layers, torch.bfloat16, torch.bfloat16)
    (told,) = (use for use in uses if "INT8" in use.part)
    assert "torch's int8 products" in told.kernels["hopper"]
    with pytest.raises(ConfigError, match="weights of the checkpoint are unpacked INT8"):
        held_formats(arch, "fp8")


def test_what_is_refused(tmp_path: Path) -> None:
    def promise(**over: Any) -> str:
        config = int8()
        config["config_groups"]["group_0"]["weights"] |= over
        with pytest.raises(ArchError) as caught:
            make_arch(tiny_config("LlamaForCausalLM", quantization_config=config))
        return str(caught.value)

    assert "num_bits is 4, but only 8 is supported" in promise(num_bits=4)
    assert "symmetric is False, but only true is supported" in promise(symmetric=False)
    assert "strategy is 'group', but only" in promise(strategy="group", group_size=32)
    model = write(tmp_path / "model", "LlamaForCausalLM", int8())
    whole = load_file(model / "model.safetensors")
    scales = "model.layers.0.mlp.up_proj.weight_scale"
    wrong: list[tuple[Tensors, str]] = [
        ({scales: whole[scales][:4]}, f"tensor {scales} has shape [4, 1]; supported for"),
        ({scales: whole[scales].double()}, "has dtype F64; supported: F32"),
        ({scales.removesuffix("_scale"): torch.ones(128, 64)}, "is missing"),
    ]
    for other, message in wrong:
        rewrite(model, lambda tensors, other=other: tensors.update(other))
        if message != "is missing":
            assert message in refusal(model)
        rewrite(model, lambda tensors: tensors.update(whole))
    rewrite(model, lambda tensors: tensors.pop(scales))
    assert "has dtype I8 and none of" in refusal(model)


def test_weights_of_experts_stay_together(tmp_path: Path) -> None:
    """The format is that of all experts of a layer."""
    arch = read_arch(write(tmp_path, "Qwen3MoeForCausalLM", int8())).quantized()
    ffn = arch.layers[0].ffn
    assert isinstance(ffn, Moe) and {type(kind) for _, kind in ffn.formats} == {Widened}
