"""Quantised checkpoints: logits are those of transformers for the exact numbers that are stored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import (
    FP8,
    Tensors,
    block,
    by_hand,
    check,
    compressed,
    four_bits,
    load_held,
    refusal,
    rewrite,
    set_config,
    write,
)
from safetensors.torch import load_file, save_file
from tiny_models import CPU, all_logits, load, some_tokens
from torch import Tensor

from gllm_engine.arch import ArchError, Model, Shard, read_arch
from gllm_engine.arch.formats import Fp8, format_name
from gllm_engine.layers import MlaAttention
from gllm_engine.model import Decoder, fill_randomly, filling, open_checkpoint
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.parallel import TensorParallel

TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
CONFIGS = {
    "block": block(16, 16),
    "ragged block": block(24, 40),  # divides no size, so heads and gates begin inside blocks
    "whole blocks": block(128, 128),
    "tensor": TENSOR,
    "channel": compressed("channel"),
    "compressed tensor": compressed("tensor"),
    "compressed block": compressed("block", block_structure=[16, 32]),
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    "modelopt block": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
INT4 = compressed("group", num_bits=4, type="int", group_size=32) | {"format": "pack-quantized"}
INT4_64 = compressed("group", num_bits=4, type="int", group_size=64) | {"format": "pack-quantized"}
FAMILIES = [
    "LlamaForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Glm4ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "Starcoder2ForCausalLM",
    "Qwen3NextForCausalLM",  # whose tensors are stored by head
    "Qwen3_5ForCausalLM",
]


def size_of(model: Path) -> tuple[int, int]:
    (kind,) = read_arch(model).quantization
    assert isinstance(kind, Fp8)
    return kind.rows, kind.columns


@pytest.mark.parametrize("name", CONFIGS)
def test_every_format(tmp_path: Path, name: str) -> None:
    model = write(tmp_path / "model", "Qwen3ForCausalLM", CONFIGS[name], num_key_value_heads=1)
    stored = load_file(model / "model.safetensors")
    assert sum(tensor.dtype == FP8 for tensor in stored.values()) == 14
    check(model, size_of(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["block", "tensor", "channel"])
def test_every_kind_of_layer(tmp_path: Path, family: str, name: str) -> None:
    model = write(tmp_path / "model", family, CONFIGS[name])
    check(model, size_of(model))


@pytest.mark.parametrize("size", [(128, 128), (24, 40)])
@pytest.mark.parametrize(
    "family",
    [
        "Qwen3NextForCausalLM",  # by head
        "Qwen3_5ForCausalLM",  # three weights, one after the other
        "Phi3ForCausalLM",
        "GPTNeoXForCausalLM",
    ],
)
def test_blocks_over_several_weights_of_a_tensor(
    tmp_path: Path, family: str, size: tuple[int, int]
) -> None:
    over = {"rope_scaling": None} if "Phi3" in family else {}
    check(write(tmp_path / "model", family, block(*size), **over), size)


@pytest.mark.parametrize(
    ("family", "config", "count"),
    [
        ("GptOssForCausalLM", MXFP4, 4),
        ("Qwen3MoeForCausalLM", MXFP4, 48),
        ("Qwen3MoeForCausalLM", INT4, 48),
        ("DeepseekV3ForCausalLM", INT4, 24),  # the experts alone, as Kimi K2
        ("Qwen3ForCausalLM", INT4, 14),
        ("LlamaForCausalLM", INT4_64 | {"ignore": []}, 14),
    ],
)
def test_four_bits(tmp_path: Path, family: str, config: dict[str, Any], count: int) -> None:
    over = {"intermediate_size": 192} if family == "LlamaForCausalLM" else {}
    model = write(tmp_path / "model", family, config, **over)
    stored = load_file(model / "model.safetensors")
    assert sum(name.endswith(("_blocks", "_packed")) for name in stored) == count
    sizes = {
        name.removesuffix("_packed") + "_shape": torch.tensor([1, 2], dtype=torch.int64)
        for name in stored
        if name.endswith("_packed")
    }
    rewrite(model, lambda tensors: tensors.update(sizes))  # is there, and is not needed
    check(model)
    logits = all_logits(load(model), some_tokens(9))
    weights = [name for name in stored if name.endswith(("_blocks", "_packed"))]
    rewrite(model, lambda tensors: [tensors[name].bitwise_xor_(0x10) for name in weights])
    assert not torch.equal(all_logits(load(model), some_tokens(9)), logits)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Qwen2MoeForCausalLM", block(24, 40)),
        ("DeepseekV3ForCausalLM", TENSOR),
        ("Qwen3MoeForCausalLM", MXFP4),
        ("Qwen3ForCausalLM", INT4),
    ],
)
def test_held_plain(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    """`quantization: none`: the same numbers without a format."""
    model = write(tmp_path, family, config)
    decoder = load_held(model, Model.widened)
    assert {view.dtype for view in decoder.weights().values()} == {torch.float32}
    right = all_logits(load(model), some_tokens(20))
    assert torch.equal(all_logits(decoder, some_tokens(20)), right)


ROUNDED = {
    "Qwen3ForCausalLM": 14,
    "Qwen2MoeForCausalLM": 4 + 3 + 4 + 3 * 9,
    "DeepseekV3ForCausalLM": 2 * 4 + 3 + 3 * 8 + 3,
}


@pytest.mark.parametrize("family", ROUNDED)
def test_rounded_when_loaded(tmp_path: Path, family: str) -> None:
    """`quantization: fp8`: as if the checkpoint had the rounded numbers."""
    model = write_tiny_model(tmp_path, family, seed=3)
    decoder = load_held(model, Model.rounded)
    ours = all_logits(decoder, some_tokens(40))
    names = [name for name in read_arch(model).weights() if name not in decoder.weights()]
    assert not [n for n in names if "norm" in n or "kv_b" in n or n.endswith("gate.weight")]
    names = [name.replace("shared_expert.", "shared_experts.") for name in names]
    if family == "Qwen2MoeForCausalLM":
        names = [name.replace("shared_experts.", "shared_expert.") for name in names]
    assert len(names) == ROUNDED[family]
    plain = all_logits(load(model), some_tokens(40))
    rewrite(model, lambda tensors: tensors.update({n: by_rows(tensors[n]) for n in names}))
    assert torch.equal(ours, all_logits(load(model), some_tokens(40)))
    assert (ours - plain).abs().max() > 0.01


def by_rows(matrix: Tensor) -> Tensor:
    """Rounded to float8, with a scale per row."""
    scales = matrix.abs().amax(1, keepdim=True) / 448
    return (matrix / scales).to(FP8).float() * scales


def test_ranks_round_their_own_parts(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, "Qwen3MoeForCausalLM", seed=3)
    stored = load_file(model / "model.safetensors")
    for apart in (False, True):
        ranks = TensorParallel(1, 2, CPU, None, True)
        shard = Shard(1, 2, 1, 2, apart)
        decoder = load_held(model, Model.rounded, shard=shard, ranks=ranks)
        held = decoder._blocks[0]._ffn._down.dequantized(torch.float32)
        for i in range(8):
            whole = stored[f"model.layers.1.mlp.experts.{i}.down_proj.weight"]
            if not apart:
                assert torch.equal(held[i], by_rows(whole[:, 16:]))
            elif i >= 4:
                assert torch.equal(held[i - 4], by_rows(whole))


@pytest.mark.parametrize("config", [MXFP4, INT4])
def test_ranks_hold_parts_of_four_bits(tmp_path: Path, config: dict[str, Any]) -> None:
    model = write(tmp_path, "Qwen3MoeForCausalLM", config, moe_intermediate_size=64)
    stored = load_file(model / "model.safetensors")
    for apart in (False, True):
        ranks = TensorParallel(1, 2, CPU, None, True)
        shard = Shard(1, 2, 1, 2, apart)
        decoder = load_held(model, lambda arch: arch, shard=shard, ranks=ranks)
        ffn = decoder._blocks[0]._ffn
        gate_up = ffn._gate_up.dequantized(torch.float32)
        down = ffn._down.dequantized(torch.float32)
        for i in range(4 if apart else 0, 8):
            own = i - 4 if apart else i
            name = f"model.layers.1.mlp.experts.{i}."
            gate, up, out = (
                four_bits(f"{name}{part}_proj.weight", stored) for part in ("gate", "up", "down")
            )
            first = 0 if apart else 32
            assert torch.equal(gate_up[own], torch.cat((gate[first:], up[first:])))
            assert torch.equal(down[own], out[:, first:])


@pytest.mark.parametrize(("config", "kind"), [(MXFP4, "MXFP4"), (INT4, "INT4")])
def test_a_split_within_a_group_of_four_bits(
    tmp_path: Path, config: dict[str, Any], kind: str
) -> None:
    model = write(tmp_path, "Qwen3MoeForCausalLM", config)
    with open_checkpoint(read_arch(model), model) as checkpoint:
        message = rf"moe_intermediate_size=32: parts of 32 are not .* the weights are {kind}"
        with pytest.raises(ArchError, match=message):
            Shard(0, 2, 0, 2).of(checkpoint.arch)
        Shard(0, 2, 0, 2, True).of(checkpoint.arch)


def test_experts_whose_gates_end_inside_blocks(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "Qwen3MoeForCausalLM", block(24, 24))
    check(model, (24, 24))


@pytest.mark.parametrize("name", ["block", "tensor", "channel"])
def test_every_scale_matters(tmp_path: Path, name: str) -> None:
    """Scales differ and each has an effect: none is loaded and then forgotten, or taken twice."""
    over = {"num_hidden_layers": 1, "decoder_sparse_step": 1}
    model = write(tmp_path, "Qwen2MoeForCausalLM", CONFIGS[name], **over)
    decoder, tokens = load(model), some_tokens(60)
    right = all_logits(decoder, tokens)
    scales = {name: view for name, view in decoder.weights().items() if "weight_scale" in name}
    assert len(scales) == 4 + 3 * 9
    for name, view in scales.items():
        view *= 1.5
        assert (all_logits(decoder, tokens) - right).abs().max() > 1e-4, name
        view /= 1.5


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """As float32, and as float8_e8m0fnu, which has an exponent and nothing else."""
    model = write(tmp_path / "model", "Qwen3ForCausalLM", block(16, 16) | {"scale_fmt": "ue8m0"})

    def rounded(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].log2().ceil().exp2()

    rewrite(model, rounded)
    check(model, (16, 16))
    logits = all_logits(load(model), some_tokens(20))

    def narrow(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].to(torch.float8_e8m0fnu)

    rewrite(model, narrow)
    assert torch.equal(all_logits(load(model), some_tokens(20)), logits)


def test_scales_in_other_shapes_and_dtypes(tmp_path: Path) -> None:
    """One scale as [] or [1], in bfloat16 too; one per row as [rows]."""
    model = write(tmp_path, "Qwen3ForCausalLM", TENSOR)
    rewrite(model, lambda t: t.update({n: t[n].bfloat16() for n in t if n.endswith("_scale")}))
    logits = all_logits(load(model), some_tokens(20))
    for shape in ([], [1]):
        rewrite(model, lambda t, shape=shape: t.update(reshaped(t, shape)))
        assert torch.equal(all_logits(load(model), some_tokens(20)), logits)


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_scales_that_a_float32_cannot_hold(tmp_path: Path, family: str) -> None:
    model = write(tmp_path, family, block(16, 16))
    experts = "experts.5." if "Moe" in family else ""
    name = f"model.layers.1.mlp.{experts}up_proj.weight_scale_inv"
    rewrite(model, lambda t: t.update({name: t[name].double()}))
    assert refusal(model) == (
        f"{model / 'model.safetensors'}: tensor {name} has dtype F64; "
        "supported: F32, F16, BF16, F8_E8M0"
    )


def reshaped(tensors: Tensors, shape: list[int]) -> Tensors:
    return {n: t.reshape(shape) for n, t in tensors.items() if n.endswith("_scale")}


@pytest.mark.parametrize("name", ["input_scale", "activation_scale"])
def test_scales_of_inputs_are_known_beside_float8_alone(tmp_path: Path, name: str) -> None:
    model = write(tmp_path / "fp8", "Qwen3ForCausalLM", TENSOR)
    logits = all_logits(load(model), some_tokens(20))
    of_input = {f"model.layers.0.mlp.down_proj.{name}": torch.tensor(0.1)}
    rewrite(model, lambda t: t.update(of_input))
    assert torch.equal(all_logits(load(model), some_tokens(20)), logits)
    plain = write_tiny_model(tmp_path / "plain", "Qwen3ForCausalLM")
    rewrite(plain, lambda t: t.update(of_input))
    assert f"down_proj.{name} is left over" in refusal(plain)


def test_the_file_decides_for_each_weight(tmp_path: Path) -> None:
    """A projection that was left plain is plain, whatever lists of exclusions say."""
    model = write(tmp_path / "model", "Qwen3ForCausalLM", block(16, 16))
    name = "model.layers.1.mlp.down_proj.weight"

    def plain(tensors: Tensors) -> None:
        scales = tensors.pop(name + "_scale_inv")
        tensors[name] = by_hand(tensors[name], scales, (16, 16))

    rewrite(model, plain)
    check(model, (16, 16))


def test_the_scale_of_a_single_row_is_one_per_row_as_the_config_says(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "Qwen2MoeForCausalLM", compressed("channel"))
    name = "model.layers.1.mlp.shared_expert_gate.weight"

    def round_gate(tensors: Tensors) -> None:
        assert len(tensors[name]) == 1
        tensors[name], scales = tensors[name].to(FP8), torch.tensor([[0.5]])
        tensors[name + "_scale"] = scales

    rewrite(model, round_gate)
    check(model, size_of(model))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("Qwen3ForCausalLM", "self_attn.k_proj"),
        ("Qwen3ForCausalLM", "mlp.up_proj"),
        ("DeepseekV3ForCausalLM", "self_attn.kv_a_proj_with_mqa"),
        ("DeepseekV3ForCausalLM", "self_attn.kv_b_proj"),
    ],
)
def test_projections_of_one_product_in_two_formats(tmp_path: Path, family: str, name: str) -> None:
    model = write(tmp_path / "model", family, block(16, 16))
    name = f"model.layers.0.{name}.weight"

    def plain(tensors: Tensors) -> None:
        tensors[name] = by_hand(tensors[name], tensors.pop(name + "_scale_inv"), (16, 16))

    rewrite(model, plain)
    check(model, (16, 16))


def test_float8_without_a_promise_in_the_config(tmp_path: Path) -> None:
    model = write(tmp_path, "Qwen3ForCausalLM", block(128, 128))
    logits = all_logits(load(model), some_tokens(20))
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))
    assert torch.equal(all_logits(load(model), some_tokens(20)), logits)


SHARDED = [
    ("LlamaForCausalLM", block(16, 16), 2, False),
    ("LlamaForCausalLM", block(8, 8), 4, False),  # two ranks share a key/value head
    ("LlamaForCausalLM", TENSOR, 4, False),
    ("Qwen2MoeForCausalLM", compressed("channel"), 2, False),
    ("Qwen3MoeForCausalLM", block(16, 16), 2, False),
    ("Qwen3MoeForCausalLM", block(32, 32), 2, True),
    ("DeepseekV3ForCausalLM", block(16, 16), 2, False),
    ("Qwen3NextForCausalLM", block(16, 16), 2, False),
    ("Qwen3NextForCausalLM", compressed("channel"), 4, True),
    ("DeepseekV3ForCausalLM", block(24, 40), 2, True),
    ("DeepseekV32ForCausalLM", block(24, 40), 2, True),
    ("Qwen3MoeForCausalLM", block(32, 32), 2, False),  # and these cut blocks
    ("LlamaForCausalLM", block(24, 40), 4, False),
    ("ChatGLMModel", block(32, 32), 4, False),
    ("ChatGLMModel", block(16, 16), 2, False),
    ("ChatGLMModel", TENSOR, 2, False),  # q, k and v are one tensor with one scale
]


@pytest.mark.parametrize(("family", "config", "size", "apart"), SHARDED)
def test_ranks_hold_parts_of_the_whole(
    tmp_path: Path, family: str, config: dict[str, Any], size: int, apart: bool
) -> None:
    """Each rank's weights, multiplied by its scales, are where they belong in the whole weights."""
    model = write(tmp_path, family, config)
    whole = exact(load(model))
    arch = read_arch(model)
    for rank in range(size):
        for stage in ((0, 1), (1, 2)):
            shard = Shard(*stage, rank, size, apart)
            ranks = TensorParallel(rank, size, CPU, None, True)
            options = {"dtype": torch.float32, "device": CPU, "max_model_len": 64}
            with open_checkpoint(arch, model) as checkpoint:
                assert checkpoint.arch.num_params() == arch.num_params()
                decoder = Decoder(checkpoint.arch, shard=shard, ranks=ranks, **options)
                with filling(decoder, checkpoint):
                    pass
            found = exact(decoder)
            assert found
            for name, part in found.items():
                starts = map(shard.start, whole[name].shape, part.shape)
                place = tuple(slice(s, s + n) for s, n in zip(starts, part.shape, strict=True))
                assert torch.equal(part, whole[name][place]), name


def exact(decoder: Decoder) -> Tensors:
    """Matrices of layers, by the tensors that were loaded."""
    views = decoder.weights()
    matrices = {}
    for name, view in views.items():
        if view.dtype == FP8:
            _, _, number, weight = name.split(".", 3)
            layer = decoder.layers[int(number) - decoder.shard.first]
            kind = dict((*layer.mixer.formats, *layer.ffn.formats))[format_name(weight)]
            scales = views[name + kind.suffix].flatten(0, -2)
            row_cut, column_cut = kind.row_cut, kind.column_cut
            rows = torch.arange(view.shape[0]) + (row_cut.first if row_cut else 0)
            columns = torch.arange(view.shape[1]) + (column_cut.first if column_cut else 0)
            # One scale is there for every row.
            of_rows = scales[rows // (kind.rows or 1)]
            matrices[name] = view.float() * of_rows[:, columns // (kind.columns or len(columns))]
    for i, made in enumerate(decoder._blocks, decoder.shard.first):
        if isinstance(made.mixer, MlaAttention):
            name = f"model.layers.{i}.self_attn.kv_b_proj.weight"
            matrices[name] = made.mixer._kv_up.flatten(0, 1)
    return matrices


@pytest.mark.parametrize("config", [MXFP4, INT4])
@pytest.mark.parametrize("hold", [Model.quantized, Model.rounded])
def test_made_up_weights_of_four_bits(
    tmp_path: Path, config: dict[str, Any], hold: Callable[[Model], Model]
) -> None:
    arch = hold(read_arch(write(tmp_path, "Qwen3MoeForCausalLM", config)))
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
    fill_randomly(decoder)
    weight = decoder._blocks[1]._ffn._gate_up.dequantized(torch.float32)
    assert math.isclose(weight.std(), 0.02, rel_tol=0.5)
    logits = all_logits(decoder, some_tokens(20))
    assert logits.isfinite().all() and logits.std() > 0.05


@pytest.mark.parametrize("name", ["block", "tensor", "channel"])
def test_made_up_weights_have_the_promised_format(tmp_path: Path, name: str) -> None:
    model = write(tmp_path, "Qwen3MoeForCausalLM", CONFIGS[name])
    arch = read_arch(model).quantized()
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
    fill_randomly(decoder)
    assert decoder.weights().keys() == load(model).weights().keys()
    for weight in exact(decoder).values():
        assert math.isclose(weight.std(), 0.02, rel_tol=0.5)
    logits = all_logits(decoder, some_tokens(20))
    assert logits.isfinite().all() and logits.std() > 0.05


DOWN = "model.layers.1.mlp.down_proj.weight"
SCALE = DOWN + "_scale_inv"


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    return write(tmp_path / "model", "LlamaForCausalLM", block(16, 16))


def test_a_missing_scale(blocks: Path) -> None:
    rewrite(blocks, lambda t: t.pop(SCALE))
    assert refusal(blocks) == (
        f"{blocks / 'model.safetensors'}: tensor {DOWN} has dtype F8_E4M3 and none of "
        f"{SCALE}, {DOWN}_scale; one is needed"
    )


def test_two_scales(blocks: Path) -> None:
    rewrite(blocks, lambda t: t.update({DOWN + "_scale": torch.ones(1)}))
    assert f"and several of {SCALE}, {DOWN}_scale; one is needed" in refusal(blocks)


def test_scales_of_an_unknown_shape(blocks: Path) -> None:
    rewrite(blocks, lambda t: t.update({SCALE: torch.ones(4, 5)}))
    assert refusal(blocks) == (
        f"{blocks / 'model.safetensors'}: tensor {SCALE} has shape [4, 5]; supported for {DOWN} "
        "[64, 96] are [], one scale, [64, 1], one per row, and [4, 6], one per block of 16 x 16"
    )


def test_scales_beside_a_plain_weight(blocks: Path) -> None:
    rewrite(blocks, lambda t: t.update({DOWN: t[DOWN].float()}))
    assert f"tensor {SCALE} is left over; the model has no place for it" in refusal(blocks)


def test_scales_that_are_whole_numbers(blocks: Path) -> None:
    rewrite(blocks, lambda t: t.update({SCALE: t[SCALE].to(torch.int32)}))
    assert f"tensor {SCALE} has dtype I32; supported: F32, F16, BF16, F8_E8M0" in refusal(blocks)


def test_float8_where_no_format_is_known(blocks: Path) -> None:
    name = "model.norm.weight"
    rewrite(blocks, lambda t: t.update({name: t[name].to(FP8)}))
    assert f"tensor {name} has dtype F8_E4M3; supported: F64, F32, F16, BF16" in refusal(blocks)


def test_float8_in_a_tensor_that_is_no_stack_of_rows(tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    write_tiny_model(tmp_path, "GPT2LMHeadModel")
    rewrite(tmp_path, lambda t: t.update({name: t[name].to(FP8)}))
    file = tmp_path / "model.safetensors"
    assert refusal(tmp_path) == (
        f"{file}: tensor {name} has dtype F8_E4M3, which is not supported for a tensor that is "
        "stored transposed or interleaved"
    )


def test_one_expert_left_plain(tmp_path: Path) -> None:
    model = write(tmp_path, "Qwen3MoeForCausalLM", block(16, 16))
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    rewrite(model, lambda t: t.update({name: t[name].float()}))
    assert f"{name} is plain, but that of an earlier expert is FP8 in blocks" in refusal(model)


def test_gates_and_ups_of_experts_in_two_formats(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "Qwen3MoeForCausalLM", block(16, 16))

    def plain(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("up_proj.weight")]:
            tensors[name] = by_hand(tensors[name], tensors.pop(name + "_scale_inv"), (16, 16))

    rewrite(model, plain)
    check(model, (16, 16))


def test_a_config_that_promises_another_format(blocks: Path, tmp_path: Path) -> None:
    set_config(blocks, compressed("channel"))
    rewrite(blocks, lambda t: t.update({n: t[n][:1, :1] for n in t if "_scale" in n}))
    assert (
        "is FP8 with one scale, but the config's quantization_config says FP8 with a scale per row"
        in refusal(blocks)
    )
    plain = write_tiny_model(tmp_path / "plain")
    set_config(plain, block(128, 128))
    assert refusal(plain) == (
        f"{plain}: the config's quantization_config says FP8 in blocks of 128 x 128, but no weight "
        "is stored so"
    )


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write(tmp_path / "model", "Qwen3ForCausalLM", INT4)


def test_int4_that_is_not_as_supported(packed: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    whole = load_file(packed / "model.safetensors")
    wrong: list[tuple[Tensors, str]] = [
        ({name + "_scale": whole[name + "_scale"][:, :2]}, "has shape [64, 2]; supported for"),
        ({name + "_scale": whole[name + "_scale"].double()}, "has dtype F64; supported: BF16"),
        ({name + "_packed": whole[name + "_packed"][:, :8]}, "has shape [64, 8], the config asks"),
        ({name + "_packed": whole[name + "_packed"].long()}, "has dtype I64; supported: I32"),
        ({name + "_zero_point": torch.zeros(1)}, "is INT4 with a scale and a zero point per 32"),
        ({name + "_g_idx": torch.zeros(1)}, "in groups of any columns, held plain, but the"),
        ({name: torch.zeros(64, 96)}, "is left over"),
        ({name + "_shape": torch.zeros(3)}, "weight_shape is left over"),
    ]
    for tensors, message in wrong:
        save_file(
            {n: t.contiguous() for n, t in (whole | tensors).items()}, packed / "model.safetensors"
        )
        assert message in (refused := refusal(packed)) and name in refused
    del whole[name + "_scale"]
    save_file(whole, packed / "model.safetensors")
    assert f"{name}_packed has no {name}_scale beside it" in refusal(packed)


def test_int4_in_other_groups_than_the_config_says(packed: Path) -> None:
    set_config(packed, INT4_64)
    expected = "INT4 with a scale per 32 columns, but the config's quantization_config says INT4 "
    assert expected + "with a scale per 64 columns" in refusal(packed)


def test_mxfp4_that_is_not_as_supported(tmp_path: Path) -> None:
    model = write(tmp_path, "Qwen3MoeForCausalLM", MXFP4)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    whole = load_file(model / "model.safetensors")
    wrong: list[tuple[Tensors, str]] = [
        ({name + "_scales": whole[name + "_scales"].bfloat16()}, "has dtype BF16; supported: U8"),
        ({name + "_scales": torch.cat([whole[name + "_scales"]] * 2)}, "has shape [128, 1], the"),
        ({name + "_blocks": whole[name + "_blocks"][..., :8]}, "has shape [64, 1, 8], the config"),
        ({name: torch.zeros(64, 32)}, "is left over"),
    ]
    for tensors, message in wrong:
        changed = {n: t.contiguous() for n, t in (whole | tensors).items()}
        save_file(changed, model / "model.safetensors")
        assert message in (refused := refusal(model)) and name in refused
    del whole[name + "_scales"]
    save_file(whole, model / "model.safetensors")
    assert f"tensor {name}_scales is missing" in refusal(model)
    with pytest.raises(ArchError, match="has 48 columns, so it cannot be MXFP4"):
        write(tmp_path / "odd", "Qwen3MoeForCausalLM", MXFP4, moe_intermediate_size=48)
