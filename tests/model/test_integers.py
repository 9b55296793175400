"""Checkpoints of GPTQ, AWQ and compressed-tensors INT4: logits are those of transformers for the
exact numbers that are stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import (
    Tensors,
    check,
    compressed,
    load_held,
    refusal,
    rewrite,
    set_config,
    write,
)
from safetensors.torch import load_file
from tiny_models import CPU, all_logits, load, some_tokens
from torch import Tensor

from gllm_engine.arch import ArchError, Model, Shard, read_arch
from gllm_engine.layers import MlaAttention
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.moe import MoeFfn
from gllm_engine.model import Decoder, fill_randomly, open_checkpoint
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops import dequantized
from gllm_engine.parallel import TensorParallel

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
GPTQ |= {"checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def int4(strategy: str = "group", **more: Any) -> dict[str, Any]:
    config = compressed(strategy, **({"num_bits": 4, "type": "int", "group_size": 32} | more))
    return config | {"format": "pack-quantized"}


CONFIGS = {
    "gptq": GPTQ,
    "gptq asymmetric": GPTQ | {"sym": False},
    "gptq v2": GPTQ | {"checkpoint_format": "gptq_v2"},
    "gptq v2 asymmetric": GPTQ | {"checkpoint_format": "gptq_v2", "sym": False},
    "gptq per row": GPTQ | {"group_size": -1, "sym": False, "desc_act": True},
    "gptq reordered": GPTQ | {"desc_act": True, "sym": False},
    "gptq static groups": GPTQ | {"desc_act": True, "static_groups": True},
    "gptq int8": GPTQ | {"bits": 8, "sym": False},
    "awq": AWQ,
    "awq per row": AWQ | {"group_size": -1},
    "compressed asymmetric": int4(symmetric=False),
    "compressed reordered": int4(actorder="group"),
    "compressed reordered asymmetric": int4(actorder="dynamic", symmetric=False),
    "compressed per row": int4("channel", group_size=None),
    "compressed per row asymmetric": int4("channel", group_size=None, symmetric=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_format(tmp_path: Path, name: str) -> None:
    model = write(tmp_path / "model", "Qwen3ForCausalLM", CONFIGS[name])
    stored = load_file(model / "model.safetensors")
    numbers = [name for name in stored if name.endswith((".qweight", "_packed"))]
    assert len(numbers) == 14 and {stored[name].dtype for name in numbers} == {torch.int32}
    check(model)


ASYMMETRIC = GPTQ | {"sym": False}
REORDERED = ASYMMETRIC | {"desc_act": True}
ZERO_POINTS = int4(symmetric=False)
INT8 = int4(num_bits=8)
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16}
LAYERS = [
    ("Qwen2MoeForCausalLM", ASYMMETRIC, {"shared_expert_intermediate_size": 64}),
    ("Qwen3MoeForCausalLM", AWQ, {}),
    ("Qwen3MoeForCausalLM", REORDERED, {}),
    ("MixtralForCausalLM", AWQ, {}),
    ("MixtralForCausalLM", ZERO_POINTS, {}),
    ("DeepseekV3ForCausalLM", ASYMMETRIC, LATENT),
    ("Phi3ForCausalLM", REORDERED, {}),  # q, k and v are one tensor with one order
    ("Phi3ForCausalLM", AWQ, {}),
    ("GPT2LMHeadModel", ASYMMETRIC, {}),
    ("GPTNeoXForCausalLM", AWQ, {}),  # whose tensors are stored by head
    ("Qwen3NextForCausalLM", ASYMMETRIC, {"shared_expert_intermediate_size": 64}),
    ("Qwen3_5ForCausalLM", AWQ, {}),
]


@pytest.mark.parametrize(("family", "config", "over"), LAYERS)
def test_every_kind_of_layer(
    tmp_path: Path, family: str, config: dict[str, Any], over: dict[str, Any]
) -> None:
    check(write(tmp_path / "model", family, config, **over))


def held_matrices(decoder: Decoder) -> Tensors:
    """The matrices that the layers compute with, by name."""
    matrices = {}
    for i, block in enumerate(decoder._blocks, decoder.shard.first):
        for linear in linears(block):
            for product in linear._products:
                sizes = product._sizes
                parts = dequantized(product.weight, torch.float32).split(list(sizes.values()))
                for name, part in zip(sizes, parts, strict=True):
                    matrices[f"{i}.{name}"] = part
        for mixer in vars(block).values():
            if isinstance(mixer, MlaAttention):  # which holds it plain
                matrices[f"{i}.kv_up"] = mixer._kv_up.flatten(0, 1)
        if isinstance(block._ffn, MoeFfn):
            ffn = block._ffn
            gates = dequantized(ffn._gate_up, torch.float32).chunk(2, 1)
            for name, stack in zip(
                ("gate", "up", "down"), (*gates, dequantized(ffn._down, torch.float32)), strict=True
            ):
                for expert, part in zip(ffn._arch.experts, stack, strict=True):
                    matrices[f"{i}.{expert}.{name}"] = part
    return matrices


def linears(layer: object) -> Iterator[Linear]:
    """All that a layer has, or a part of it."""
    for part in vars(layer).values():
        if isinstance(part, Linear):
            yield part
        elif type(part).__module__.startswith("gllm_engine.layers."):
            yield from linears(part)


WIDE = {"intermediate_size": 192}
SHARDED = [
    ("LlamaForCausalLM", ASYMMETRIC, WIDE, 2, False),
    ("LlamaForCausalLM", ASYMMETRIC | {"group_size": 64}, WIDE, 2, False),  # cuts groups
    ("LlamaForCausalLM", AWQ | {"group_size": -1}, WIDE, 2, False),
    ("LlamaForCausalLM", REORDERED, WIDE, 2, False),
    ("LlamaForCausalLM", int4(symmetric=False, group_size=64), WIDE, 2, False),
    ("Phi3ForCausalLM", AWQ, WIDE | {"head_dim": 16}, 2, False),
    ("Qwen3_5ForCausalLM", ASYMMETRIC, WIDE, 2, False),
    ("GPTNeoXForCausalLM", AWQ, WIDE, 2, False),
    ("DeepseekV3ForCausalLM", AWQ, LATENT | WIDE | {"moe_intermediate_size": 64}, 2, False),
    ("Qwen3MoeForCausalLM", AWQ, {"moe_intermediate_size": 64}, 2, False),
    ("Qwen3MoeForCausalLM", REORDERED, {"moe_intermediate_size": 64}, 2, False),
    ("Qwen3MoeForCausalLM", ZERO_POINTS, {}, 2, True),
    # Held plain: parts of 16 and 40 columns.
    ("LlamaForCausalLM", REORDERED, {"intermediate_size": 160}, 4, False),
    ("LlamaForCausalLM", CONFIGS["gptq int8"], {"intermediate_size": 160}, 4, False),
    ("Qwen3MoeForCausalLM", INT8, {"moe_intermediate_size": 96}, 4, False),
]


@pytest.mark.parametrize(("family", "config", "over", "size", "apart"), SHARDED)
def test_ranks_hold_parts_of_the_whole(
    tmp_path: Path,
    family: str,
    config: dict[str, Any],
    over: dict[str, Any],
    size: int,
    apart: bool,
) -> None:
    model = write(tmp_path, family, config, hidden_size=128, **over)
    whole = held_matrices(load(model))
    for rank in range(size):
        shard = Shard(0, 2, rank, size, apart)
        ranks = TensorParallel(rank, size, CPU, None, True)
        found = held_matrices(load_held(model, lambda arch: arch, shard=shard, ranks=ranks))
        assert len(found) >= 10
        for name, part in found.items():
            starts = map(shard.start, whole[name].shape, part.shape)
            place = tuple(slice(s, s + n) for s, n in zip(starts, part.shape, strict=True))
            assert torch.equal(part, whole[name][place]), name


def test_splits_that_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "columns", "LlamaForCausalLM", ASYMMETRIC)
    narrow = {"head_dim": 4, "num_attention_heads": 8}
    rows = write(tmp_path / "rows", "Qwen3ForCausalLM", AWQ, **narrow)
    columns = "64 columns of self_attn.o_proj.weight would be split into parts of 16, but they are "
    wrong = {
        model: (4, columns + "GPTQ INT4 with a scale and a zero point per 32 columns"),
        rows: (2, "8 rows of self_attn.k_proj.weight would be split into parts of 4, but they"),
    }
    for path, (size, message) in wrong.items():
        with open_checkpoint(read_arch(path), path) as checkpoint:
            with pytest.raises(ArchError, match=message) as caught:
                Shard(0, 2, 0, size).of(checkpoint.arch)
            assert "enable_expert_parallel" not in str(caught.value)
            if path == model:  # an int32 holds 8 numbers
                Shard(0, 2, 0, size).of(checkpoint.arch.widened())
            else:
                with pytest.raises(ArchError, match=message):
                    Shard(0, 2, 0, size).of(checkpoint.arch.widened())


@pytest.mark.parametrize("name", ["gptq", "awq", "gptq reordered", "gptq int8"])
def test_made_up_weights(tmp_path: Path, name: str) -> None:
    arch = read_arch(write(tmp_path, "Qwen3MoeForCausalLM", CONFIGS[name])).quantized()
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
    fill_randomly(decoder)
    for matrix, weight in held_matrices(decoder).items():
        assert math.isclose(weight.std(), 0.02, rel_tol=0.5), matrix
    logits = all_logits(decoder, some_tokens(20))
    assert logits.isfinite().all() and logits.std() > 0.05


@pytest.mark.parametrize("name", ["gptq asymmetric", "awq", "compressed asymmetric"])
def test_held_plain(tmp_path: Path, name: str) -> None:
    """`quantization: none`: the same numbers without a format."""
    model = write(tmp_path, "Qwen3MoeForCausalLM", CONFIGS[name])
    plain = load_held(model, Model.widened)
    assert sum(plain.weight_bytes().values()) > 1.3 * sum(load(model).weight_bytes().values())
    right = all_logits(load(model), some_tokens(20))
    assert torch.equal(all_logits(plain, some_tokens(20)), right)


def test_every_stored_number_matters(tmp_path: Path) -> None:
    for name in ("gptq asymmetric", "gptq reordered", "awq", "compressed asymmetric"):
        model = write(tmp_path / name, "Qwen3MoeForCausalLM", CONFIGS[name])
        tensors = load_file(model / "model.safetensors")
        right = all_logits(load(model), some_tokens(60))
        own = {
            "self_attn.k_proj.": ("qweight", "qzeros", "scales", "weight_packed", "weight_scale"),
            "mlp.experts.1.down_proj.": ("qweight", "qzeros", "scales", "weight_zero_point"),
            "mlp.experts.1.up_proj.": ("qweight", "weight_packed"),
        }
        names = [f"model.layers.0.{at}{end}" for at, ends in own.items() for end in ends]
        if name == "gptq reordered":
            names.append("model.layers.0.self_attn.k_proj.g_idx")
        names = [name for name in names if name in tensors]
        assert len(names) >= 2
        for changed in names:
            other = {key: tensor.clone() for key, tensor in tensors.items()}
            other[changed] = other[changed].flip(*range(other[changed].dim()))
            rewrite(model, lambda tensors, other=other: tensors.update(other))
            assert (all_logits(load(model), some_tokens(60)) - right).abs().max() > 1e-4, changed


def test_what_the_config_says_of_the_same_tensors_matters(tmp_path: Path) -> None:
    model = write(tmp_path, "Qwen3ForCausalLM", ASYMMETRIC)
    right = all_logits(load(model), some_tokens(20))
    set_config(model, ASYMMETRIC | {"checkpoint_format": "gptq_v2"})
    assert (all_logits(load(model), some_tokens(20)) - right).abs().max() > 0.1
    set_config(model, ASYMMETRIC | {"desc_act": True})  # only that groups may have any columns
    torch.testing.assert_close(all_logits(load(model), some_tokens(20)), right)


def test_a_zero_point_of_zero(tmp_path: Path) -> None:
    """GPTQ stores -1, which takes 1 from the next zero point in an int32."""
    model = write(tmp_path / "model", "Qwen3ForCausalLM", ASYMMETRIC)
    name = "model.layers.1.mlp.down_proj.qzeros"
    word = sum(zero << 4 * i for i, zero in enumerate([0, 5, 0, 0, 1, 15, 9, 8])) - 0x11111111
    stored = torch.tensor([word - 2**32 if word >= 2**31 else word], dtype=torch.int32)
    rewrite(model, lambda tensors: tensors[name].copy_(stored.expand_as(tensors[name])))
    check(model)
    weight = load(model)._blocks[1]._ffn._down._products[0].weight
    assert weight.scales[0, :8, 1].tolist() == [0, 5, 0, 0, 1, 15, 9, 8]


@pytest.mark.parametrize(
    ("config", "file", "stored"),
    [
        (GPTQ, "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}),
        (AWQ, "quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
        (AWQ, "quantize_config.json", {"quant_method": "awq", "bits": 4, "group_size": 32}),
    ],
)
def test_a_config_in_a_file_of_its_own(
    tmp_path: Path, config: dict[str, Any], file: str, stored: dict[str, Any]
) -> None:
    """As tools wrote it before config.json had a place for it, which goes before it."""
    model = write(tmp_path, "Qwen3ForCausalLM", config)
    right = all_logits(load(model), some_tokens(20))
    (model / file).write_text(json.dumps({"bits": 5}))
    assert torch.equal(all_logits(load(model), some_tokens(20)), right)
    set_config(model, {})
    (model / file).write_text(json.dumps(stored | {"zero_point": True, "sym": True}))
    assert torch.equal(all_logits(load(model), some_tokens(20)), right)
    (model / file).write_text(json.dumps({"bits": 5, "group_size": 32}))
    with pytest.raises(ArchError, match="bits is 5; supported are 4 and 8"):
        load(model)


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    return write(tmp_path / "model", "Qwen3ForCausalLM", GPTQ)


MODULE = "model.layers.1.mlp.down_proj."


def test_what_gptq_stores_and_nobody_needs(gptq: Path) -> None:
    """A bias of zeros, which old tools wrote; or neither order nor zero points."""
    right = all_logits(load(gptq), some_tokens(20))
    bias = {MODULE + "bias": torch.zeros(64, dtype=torch.float16)}
    rewrite(gptq, lambda tensors: tensors.update(bias))
    assert torch.equal(all_logits(load(gptq), some_tokens(20)), right)
    rewrite(gptq, lambda tensors: [tensors.pop(MODULE + own) for own in ("g_idx", "qzeros")])
    assert torch.equal(all_logits(load(gptq), some_tokens(20)), right)


def test_numbers_that_contradict_the_config(gptq: Path) -> None:
    file = gptq / "model.safetensors"
    whole = load_file(file)
    says = "but the config's quantization_config says"
    wrong: dict[str, tuple[Callable[[Tensor], object], str]] = {
        "g_idx": (
            lambda t: t.copy_(t.flip(0)),
            f"columns in groups out of order, {says} desc_act: false",
        ),
        "qzeros": (
            lambda t: t[1, 2].fill_(0x77777767),
            f"zero points other than 8, {says} sym: true",
        ),
    }
    for own, (change, message) in wrong.items():
        rewrite(gptq, lambda tensors, own=own, change=change: change(tensors[MODULE + own]))
        assert refusal(gptq) == f"{file}: tensor {MODULE}{own} has {message}"
        rewrite(gptq, lambda tensors: tensors.update(whole))
    bias = torch.zeros(64).half()
    bias[63] = 1
    rewrite(gptq, lambda tensors: tensors.update({MODULE + "bias": bias}))
    message = "has a bias that is not zero, and the model has no place for it"
    assert message in refusal(gptq)


def test_groups_that_do_not_exist(tmp_path: Path) -> None:
    model = write(tmp_path, "Qwen3MoeForCausalLM", REORDERED)
    name = "model.layers.1.mlp.experts.3.down_proj.g_idx"
    for number in (-1, 1):  # there is one group
        rewrite(model, lambda tensors, number=number: tensors[name][7].fill_(number))
        assert f"tensor {name} has numbers that are no group's" in refusal(model)


def test_one_tensor_of_all_experts(tmp_path: Path) -> None:
    """No tool writes it, so nobody knows how gate and up would lie in it."""
    model = write(tmp_path, "GptOssForCausalLM", int4())
    message = "up_proj_packed has whole numbers, which are not supported for one tensor of all"
    assert message in refusal(model)


def test_tensors_that_are_not_as_supported(gptq: Path) -> None:
    whole = load_file(gptq / "model.safetensors")
    wrong: list[tuple[Tensors, str]] = [
        ({MODULE + "scales": whole[MODULE + "scales"][:2]}, "has shape [2, 64]; supported for"),
        ({MODULE + "scales": whole[MODULE + "scales"][0]}, "has shape [64]; supported for"),
        (
            {MODULE + "scales": whole[MODULE + "scales"][:, :8]},
            "shape [3, 8], the config asks for [3",
        ),
        ({MODULE + "scales": whole[MODULE + "scales"].double()}, "has dtype F64; supported: BF16"),
        (
            {MODULE + "qweight": whole[MODULE + "qweight"].T},
            "shape [64, 12], the config asks for [12",
        ),
        ({MODULE + "qweight": whole[MODULE + "qweight"].long()}, "has dtype I64; supported: I32"),
        (
            {MODULE + "qzeros": whole[MODULE + "qzeros"][:1]},
            "has shape [1, 8], the config asks for [3",
        ),
        (
            {MODULE + "g_idx": whole[MODULE + "g_idx"][:9]},
            "has shape [9], the config asks for [96]",
        ),
        ({MODULE + "bias": torch.zeros(3)}, "has shape [3], the config asks for [64]"),
        ({MODULE + "weight": torch.zeros(64, 96)}, "is left over"),
        ({MODULE + "perm": torch.zeros(1)}, "is left over"),
    ]
    for tensors, message in wrong:
        rewrite(
            gptq,
            lambda t, tensors=tensors: t.update({n: x.contiguous() for n, x in tensors.items()}),
        )
        assert message in (refused := refusal(gptq)) and MODULE in refused
        rewrite(gptq, lambda t: [t.clear(), t.update(whole)])
    rewrite(gptq, lambda t: t.pop(MODULE + "scales"))
    assert f"{MODULE}qweight has no {MODULE}scales beside it" in refusal(gptq)


# The scales of one expert.
SCALES = {
    "GPTQ": ("model.layers.1.mlp.experts.3.up_proj.scales", GPTQ),
    "AWQ": ("model.layers.1.mlp.experts.3.up_proj.scales", AWQ),
    "INT4": ("model.layers.1.mlp.experts.3.up_proj.weight_scale", int4()),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_an_expert_in_another_dtype(tmp_path: Path, name: str) -> None:
    """All experts of a layer have one dtype of scales, which must hold what is stored exactly."""
    scales, config = SCALES[name]
    model = write(tmp_path, "Qwen3MoeForCausalLM", config)
    whole = load_file(model / "model.safetensors")
    usual = whole[scales].dtype
    others = {torch.float16, torch.bfloat16, torch.float32} - {usual}
    told = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    for other in others:
        rewrite(model, lambda t, other=other: t.update({scales: whole[scales].to(other)}))
        assert refusal(model) == (
            f"{model / 'model.safetensors'}: tensor {scales} has dtype {told[other]}; "
            f"supported: {told[usual]}"
        )
    if config is AWQ:  # scales beside zero points are never held as float32
        return
    rewrite(model, lambda t: [t.clear(), t.update(whole)])
    right = all_logits(load(model), some_tokens(20))
    wide = {n: t.float() for n, t in whole.items() if n.endswith(("scales", "_scale"))}
    rewrite(model, lambda t: t.update({n: t for n, t in wide.items() if n != scales}))
    torch.testing.assert_close(all_logits(load(model), some_tokens(20)), right, rtol=0, atol=1e-5)


def test_rows_that_share_an_int32_with_another_weight(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, "Qwen3ForCausalLM", head_dim=4, num_key_value_heads=1)
    set_config(model, AWQ)
    module = "model.layers.0.self_attn.k_proj."
    stored = {
        module + "qweight": torch.zeros(64, 1, dtype=torch.int32),
        module + "scales": torch.zeros(2, 4).half(),
    }
    rewrite(model, lambda t: [t.pop(module + "weight"), t.update(stored)])
    assert (
        "whose int32 have 8 rows each, but model.layers.0.self_attn.k_proj.weight has 4 rows"
        in (refusal(model))
    )


def test_configs_of_other_formats_than_the_files(gptq: Path, tmp_path: Path) -> None:
    set_config(gptq, GPTQ | {"group_size": 64})
    assert (
        "is GPTQ INT4 with a scale per 32 columns, but the config's quantization_config says GPTQ "
        "INT4 with a scale per 64 columns"
    ) in refusal(gptq)
    set_config(gptq, AWQ)
    assert "has shape [12, 64], the config asks for [96, 8]" in refusal(gptq)
    for config in (None, {"quant_method": "fp8"}):
        set_config(gptq, config)
        assert (
            "qweight needs a quantization_config in the config that says whether it is of GPTQ or"
        ) in refusal(gptq)
    lacking = write(tmp_path / "lacking", "Qwen3ForCausalLM", ASYMMETRIC)
    rewrite(lacking, lambda t: t.pop(MODULE + "qzeros"))
    assert f"tensor {MODULE}qzeros is missing" in refusal(lacking)


def test_a_module_left_plain(tmp_path: Path) -> None:
    """As `modules_to_not_convert` and `dynamic` say; the file tells."""
    config = GPTQ | {"dynamic": {"-:.*down_proj": {}, "lm_head": {}}}
    model = write(tmp_path / "model", "Qwen3ForCausalLM", config)

    def plain(tensors: Tensors) -> None:
        for own in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[MODULE + own]
        tensors[MODULE + "weight"] = torch.randn(64, 96) / 10

    rewrite(model, plain)
    check(model)
