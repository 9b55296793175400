"""From config.json to a Model: defaults, old and new spellings, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gllm_engine.arch import (
    FAMILIES,
    ArchError,
    Dense,
    Gqa,
    Model,
    Moe,
    Routing,
    make_arch,
    read_arch,
)
from gllm_engine.arch.rope import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling
from gllm_engine.arch.tiny import tiny_config

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
    "eos_token_id": [128001, 128008, 128009],
}
CHATGLM3_6B = {
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def tiny(family: str = "LlamaForCausalLM", **over: Any) -> Model:
    return make_arch(tiny_config(family, **over))


def rope_of(model: Model) -> Rope:
    (rope,) = {layer.mixer.rope for layer in model.layers}
    return rope


def refusal(family: str = "LlamaForCausalLM", **over: Any) -> str:
    with pytest.raises(ArchError) as caught:
        tiny(family, **over)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_llama_8b() -> None:
    model = make_arch(LLAMA_8B)
    mixer = model.layers[31].mixer
    assert (mixer.heads, mixer.kv_heads, mixer.head_dim) == (32, 8, 128)
    assert mixer.rope == Rope(128, 500_000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert model.num_params() == 8_030_261_248
    assert model.kv_bytes_per_token(itemsize=2) == 131_072
    assert model.max_len == 131_072
    assert model.eos_token_ids == (128001, 128008, 128009)


def test_chatglm3_6b() -> None:
    model = make_arch(CHATGLM3_6B)
    assert model.num_params() == 6_243_584_000
    assert rope_of(model) == Rope(64, 10_000.0, interleaved=True)
    assert (model.max_len, model.eps, model.eos_token_ids) == (8192, 1e-5, (2,))
    assert make_arch(CHATGLM3_6B | {"rope_ratio": 500}).layers[0].mixer.rope.theta == 5e6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_tiny_config(family: str) -> None:
    model = tiny(family)
    assert (model.dim, model.vocab, len(model.layers), model.max_len) == (64, 384, 2, 2048)


def test_an_almost_empty_config_has_the_familys_defaults() -> None:
    def bare(name: str) -> Model:
        return make_arch({"architectures": [name]})

    llama = bare("LlamaForCausalLM")
    assert (llama.dim, llama.vocab, llama.max_len, llama.eos_token_ids) == (4096, 32000, 2048, (2,))
    assert llama.layers[0].mixer.kv_heads == 32
    assert bare("MistralForCausalLM").layers[0].mixer.window == 4096
    assert bare("Qwen3ForCausalLM").layers[0].mixer.window is None
    assert bare("Glm4ForCausalLM").layers[0].mixer.rope.dim == 64


def test_null_is_no_value_and_no_default() -> None:
    assert tiny("MistralForCausalLM", sliding_window=None).layers[0].mixer.window is None
    assert tiny(num_key_value_heads=None).layers[0].mixer.kv_heads == 4
    assert tiny(head_dim=None).layers[0].mixer.head_dim == 16
    assert tiny(eos_token_id=None).eos_token_ids == ()
    assert refusal(hidden_size=None) == "config.json: hidden_size is missing"


@pytest.mark.parametrize(
    ("over", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}, [None, None]),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, [None, 9]),
        ({"use_sliding_window": True, "sliding_window": 9}, [None, None]),
        ({"use_sliding_window": True, "sliding_window": None}, [None, None]),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [9, None],
        ),
        ({"layer_types": ["full_attention"] * 2}, [None, None]),
    ],
)
@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows(family: str, over: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.mixer.window for layer in tiny(family, **over).layers] == windows


def test_biases() -> None:
    def biases(family: str, **over: Any) -> tuple[bool, bool, bool]:
        layer = tiny(family, **over).layers[0]
        return layer.mixer.qkv_bias, layer.mixer.out_bias, layer.ffn.bias

    assert biases("LlamaForCausalLM") == (False, False, False)
    assert biases("LlamaForCausalLM", attention_bias=True) == (True, True, False)
    assert biases("LlamaForCausalLM", mlp_bias=True) == (False, False, True)
    assert biases("Qwen2ForCausalLM") == (True, False, False)
    assert biases("Qwen3ForCausalLM", attention_bias=True) == (True, True, False)
    assert biases("GlmForCausalLM") == (True, False, False)
    assert biases("ChatGLMModel", add_qkv_bias=False) == (False, False, False)
    assert biases("ChatGLMModel", add_bias_linear=True) == (True, True, True)


def test_glm4_is_glm_with_sandwich_norms() -> None:
    glm, glm4 = tiny("GlmForCausalLM"), tiny("Glm4ForCausalLM")
    assert {layer.place for layer in glm4.layers} == {"sandwich"}
    assert [layer.mixer for layer in glm4.layers] == [layer.mixer for layer in glm.layers]


def test_qwen3_30b_a3b() -> None:
    model = read_arch(Path(__file__).parents[2] / "benchmarks/models/qwen3-30b-a3b")
    assert {layer.ffn for layer in model.layers} == {Moe(128, 768, Routing(8, True))}
    assert model.num_params() == 30_532_122_624


def test_experts() -> None:
    def ffns(family: str, **over: Any) -> list[Dense | Moe]:
        return [layer.ffn for layer in tiny(family, **over).layers]

    moe = Moe(8, 32, Routing(2, renorm=True))
    plain = replace(moe, routing=Routing(2, renorm=False))
    shared = replace(plain, shared=48, shared_gate=True)
    assert ffns("MixtralForCausalLM") == [replace(moe, hidden=96)] * 2
    assert ffns("Qwen3MoeForCausalLM") == [moe] * 2
    assert ffns("Qwen3MoeForCausalLM", norm_topk_prob=None) == [plain] * 2
    assert ffns("Qwen3MoeForCausalLM", mlp_only_layers=[0]) == [Dense(96), moe]
    assert ffns("Qwen2MoeForCausalLM") == [Dense(96), shared]
    assert ffns("Qwen2MoeForCausalLM", decoder_sparse_step=None) == [shared] * 2
    # As transformers 5 saves them.
    renamed = {"num_experts": None, "num_local_experts": 4}
    assert ffns("Qwen3MoeForCausalLM", **renamed) == [replace(moe, num_experts=4)] * 2
    bare = make_arch({"architectures": ["Qwen3MoeForCausalLM"]})
    assert bare.layers[0].ffn == Moe(128, 768, Routing(8, False))
    assert not tiny("Qwen2MoeForCausalLM", qkv_bias=False).layers[0].mixer.qkv_bias


def test_a_rank_lists_the_experts_it_holds_by_their_global_numbers() -> None:
    moe = Moe(8, 16, Routing(2, True), shared=12, shared_gate=True, local_experts=(5, 2))
    shapes = moe.weights(64)
    experts = {name.split(".")[2] for name in shapes if ".experts." in name}
    assert experts == {"5", "6"}
    assert shapes["mlp.gate.weight"] == (8, 64)
    assert shapes["mlp.experts.6.down_proj.weight"] == (64, 16)
    assert shapes["mlp.shared_expert.up_proj.weight"] == (12, 64)
    assert len(shapes) == 1 + 2 * 3 + 4
    alone = replace(moe, local_experts=None, shared=0, shared_gate=False)
    assert len(alone.weights(64)) == 1 + 8 * 3


def test_deepseeks_experts() -> None:
    def ffns(**over: Any) -> list[Dense | Moe]:
        return [layer.ffn for layer in tiny("Glm4MoeForCausalLM", **over).layers]

    routing = Routing(2, True, "sigmoid", True, groups=4, kept_groups=2, sum_eps=1e-20, scale=1.5)
    moe = Moe(8, 32, routing, shared=32)
    assert ffns() == [Dense(96), moe]
    assert ffns(first_k_dense_replace=0) == [moe] * 2
    assert ffns(n_shared_experts=3)[1] == replace(moe, shared=96)
    assert ffns(n_shared_experts=None)[1] == replace(moe, shared=0)
    one_group = replace(moe, routing=replace(routing, groups=1, kept_groups=1))
    assert ffns(n_group=None, topk_group=None)[1] == one_group
    assert tiny("Glm4MoeForCausalLM").extra_layers == 1
    bare = make_arch({"architectures": ["Glm4MoeForCausalLM"], "head_dim": 128})
    routing = Routing(8, True, "sigmoid", True, sum_eps=1e-20)
    assert [layer.ffn for layer in bare.layers[:2]] == [
        Dense(10944),
        Moe(128, 1408, routing, shared=1408),
    ]
    assert bare.layers[0].mixer == Gqa(96, 8, 128, Rope(64, 10_000.0))


def test_ernies_experts() -> None:
    def ffns(**over: Any) -> list[bool]:
        model = tiny("Ernie4_5_MoeForCausalLM", num_hidden_layers=6, **over)
        return [isinstance(layer.ffn, Moe) for layer in model.layers]

    model = tiny("Ernie4_5_MoeForCausalLM", moe_norm_min=0.5)
    routing = Routing(2, True, biased=True, least_sum=0.5)
    assert [layer.ffn for layer in model.layers] == [Dense(96), Moe(8, 32, routing, shared=64)]
    assert ffns() == [False, True, True, True, True, True]
    assert ffns(moe_layer_start_index=2, moe_layer_end_index=4) == [
        i in (2, 3, 4) for i in range(6)
    ]
    assert ffns(moe_layer_interval=2) == [i in (1, 3, 5) for i in range(6)]


@pytest.mark.parametrize(
    ("family", "over", "message"),
    [
        (
            "Glm4MoeForCausalLM",
            {"n_group": 3},
            "n_group is 3, but only a divisor of the 8 experts that leaves two or more in a group "
            "is supported",
        ),
        (
            "Glm4MoeForCausalLM",
            {"n_group": 8},
            "n_group is 8, but only a divisor of the 8 experts that leaves two or more in a group "
            "is supported",
        ),
        (
            "Glm4MoeForCausalLM",
            {"topk_group": 5},
            "topk_group is 5, but only a whole number from 1 to 4 is supported",
        ),
        (
            "Glm4MoeForCausalLM",
            {"topk_group": 1, "num_experts_per_tok": 3},
            "topk_group is 1, but 1 groups of 2 experts have fewer than num_experts_per_tok=3",
        ),
        (
            "Glm4MoeForCausalLM",
            {"scoring_func": "sqrtsoftplus"},
            "scoring_func is 'sqrtsoftplus', but only \"sigmoid\" is supported",
        ),
        (
            "Glm4MoeForCausalLM",
            {"first_k_dense_replace": -1},
            "first_k_dense_replace is -1, but only a whole number from 0 to 512 is supported",
        ),
        (
            "Ernie4_5_MoeForCausalLM",
            {"use_bias": True},
            "use_bias is True, but only false is supported",
        ),
        (
            "Ernie4_5_MoeForCausalLM",
            {"moe_k": 9},
            "moe_k is 9, but only 1 to 8 is supported, the number of experts",
        ),
    ],
)
def test_routings_refused(family: str, over: dict[str, Any], message: str) -> None:
    assert refusal(family, **over) == f"config.json: {message}"


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (
            {"num_experts_per_tok": 9},
            "config.json: num_experts_per_tok is 9, but only 1 to 8 is supported, "
            "the number of experts",
        ),
        (
            {"mlp_only_layers": ["0"]},
            "config.json: mlp_only_layers is ['0'], "
            "but only a layer number or a list of at most 512 of them is supported",
        ),
        (
            {"use_sliding_window": True},
            "config.json: use_sliding_window is True, but only false is supported",
        ),
        (
            {"moe_intermediate_size": 0},
            "config.json: moe_intermediate_size is 0, "
            "but only a whole number from 1 to 16777216 is supported",
        ),
    ],
)
@pytest.mark.parametrize("family", ["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_refused(family: str, over: dict[str, Any], message: str) -> None:
    assert refusal(family, **over) == message


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
}
OLD = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}}
NEW = {
    "rope_theta": None,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
}


def packed(**over: Any) -> dict[str, Any]:
    """INT4 in groups, as compressed-tensors describes it."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    weights |= {"symmetric": True, "dynamic": False, "actorder": None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | over}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return config | {"config_groups": groups}


def test_rope_old_and_new_form() -> None:
    assert (
        rope_of(tiny(**OLD)) == rope_of(tiny(**NEW)) == Rope(16, 500.0, scaling=LinearScaling(2.0))
    )
    assert rope_of(tiny(rope_theta=None)) == Rope(16, 10_000.0)
    inside = {"rope_theta": 7.0, "partial_rotary_factor": 0.25}
    glm = tiny("GlmForCausalLM", rope_theta=9.0, rope_parameters=inside)
    assert rope_of(glm) == Rope(4, 7.0, interleaved=True)
    assert rope_of(tiny("GlmForCausalLM", rope_parameters={})) == Rope(8, 10_000.0, True)


def test_rope_scalings_and_the_length_they_reach() -> None:
    def scaled(**rope: Any) -> Model:
        return tiny(rope_scaling=rope)

    model = scaled(type="dynamic", factor=4.0)
    assert (rope_of(model).scaling, model.max_len) == (DynamicScaling(4.0, 2048), 8192)
    model = scaled(type="yarn", factor=4.0, original_max_position_embeddings=2048, finetuned=True)
    assert model.max_len == 8192
    assert rope_of(model).scaling == YarnScaling(4.0, 2048, None, None, None, 32.0, 1.0, True)
    model = scaled(rope_type="yarn", original_max_position_embeddings=512, truncate=False)
    assert model.max_len == 2048
    assert rope_of(model).scaling == YarnScaling(4.0, 512, None, None, None, 32.0, 1.0, False)
    assert scaled(type="linear", factor=4.0).max_len == 2048


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (
            {"rope_scaling": {"type": "ntk", "factor": 2.0}},
            "config.json: rope_scaling: RoPE type 'ntk' is not supported; "
            "supported are default, linear, dynamic, llama3, yarn, longrope",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "config.json: rope_scaling: short_factor is [1.0], "
            "but only a list of 8 numbers above 0 is supported",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 50.0}},
            "config.json: rope_scaling: key 'alpha' is not supported",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}},
            "config.json: rope_scaling: key 'llama_4_scaling_beta' is not supported",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "config.json: rope_parameters: key 'full_attention' is not supported",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "config.json: rope_scaling: factor is missing",
        ),
        (
            {"rope_scaling": "linear"},
            "config.json: rope_scaling is 'linear', but only an object is supported",
        ),
        (
            {"rope_scaling": {"type": 3}},
            "config.json: rope_scaling: type is 3, but only a string is supported",
        ),
        (
            {"partial_rotary_factor": 0.3},
            "config.json: partial_rotary_factor=0.3 of head_dim=16 is 4.8 channels; "
            "a whole even number from 2 to 16 is needed",
        ),
        (
            {"partial_rotary_factor": 1.5},
            "config.json: partial_rotary_factor=1.5 of head_dim=16 is 24.0 channels; "
            "a whole even number from 2 to 16 is needed",
        ),
        (
            {"dual_chunk_attention_config": {"chunk_size": 1}},
            "config.json: dual_chunk_attention_config is {'chunk_size': 1}, "
            "but only null is supported",
        ),
        (
            {"hidden_act": "gelu"},
            "config.json: hidden_act is 'gelu', but only \"silu\" is supported",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "config.json: quantization_config: quant_method is 'gptq'; "
            "supported are fp8, fbgemm_fp8, compressed-tensors, modelopt, mxfp4",
        ),
        (
            {"quantization_config": "fp8"},
            "config.json: quantization_config is 'fp8', but only an object is supported",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "config.json: quantization_config: quant_method is ''; "
            "supported are fp8, fbgemm_fp8, compressed-tensors, modelopt, mxfp4",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
            "config.json: quantization_config: fmt is 'e5m2', but only \"e4m3\" is supported",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "none"}},
            "config.json: quantization_config: activation_scheme is 'none'; "
            "supported are dynamic, static",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
            "config.json: quantization_config: weight_block_size is [128, 0], "
            "but only a list of 2 whole numbers from 1 to 16777216 is supported",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "config.json: quantization_config: quant_algo is 'NVFP4'; "
            "supported are FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO",
        ),
        (
            {"quantization_config": COMPRESSED | {"format": "nvfp4-pack-quantized"}},
            "config.json: quantization_config: format is 'nvfp4-pack-quantized'; "
            "supported are float-quantized, pack-quantized",
        ),
        (
            {"quantization_config": packed(symmetric=False)},
            "config.json: quantization_config: config_groups: group_0: weights: "
            "symmetric is False, but only true is supported",
        ),
        (
            {"quantization_config": packed(group_size=48)},
            "config.json: quantization_config: config_groups: group_0: weights: "
            "group_size is 48; supported are 32, 64, 128",
        ),
        (
            {"quantization_config": packed(actorder="group")},
            "config.json: quantization_config: config_groups: group_0: weights: "
            "actorder is 'group'; supported are static, weight",
        ),
        (
            {"quantization_config": COMPRESSED | {"config_groups": {}}},
            "config.json: quantization_config: config_groups has 0 groups; 1 is supported",
        ),
        (
            {"quantization_config": COMPRESSED},
            "config.json: quantization_config: config_groups: group_0: weights: "
            "num_bits is 4, but only 8 is supported",
        ),
        (
            {"num_key_value_heads": 3},
            "config.json: 4 attention heads cannot share 3 key/value heads evenly",
        ),
        (
            {"hidden_size": "64"},
            "config.json: hidden_size is '64', "
            "but only a whole number from 1 to 16777216 is supported",
        ),
        (
            {"num_hidden_layers": 0},
            "config.json: num_hidden_layers is 0, "
            "but only a whole number from 1 to 512 is supported",
        ),
        (
            {"rms_norm_eps": True},
            "config.json: rms_norm_eps is True, but only a number above 0 is supported",
        ),
        (
            {"tie_word_embeddings": "yes"},
            "config.json: tie_word_embeddings is 'yes', but only true or false is supported",
        ),
        (
            {"eos_token_id": [1, -1]},
            "config.json: eos_token_id is [1, -1], "
            "but only a token id or a list of at most 256 of them is supported",
        ),
        (
            {"eos_token_id": [7] * 257},
            f"config.json: eos_token_id is [{'7, ' * 15}7,... {'7, ' * 15}7], "
            "but only a token id or a list of at most 256 of them is supported",
        ),
    ],
)
def test_refused(over: dict[str, Any], message: str) -> None:
    assert refusal(**over) == message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("multi_query_attention", False),
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("original_rope", False),
        ("apply_residual_connection_post_layernorm", True),
        ("vision_config", {"layers": 3}),
        ("pre_seq_len", 128),
        ("quantization_bit", 4),
    ],
)
def test_chatglm_switches_refused(key: str, value: Any) -> None:
    assert refusal("ChatGLMModel", **{key: value}).startswith(f"config.json: {key} is ")


@pytest.mark.parametrize(
    ("family", "over", "key"),
    [
        ("SmolLM3ForCausalLM", {"use_sliding_window": True}, "use_sliding_window"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("HunYuanDenseV1ForCausalLM", {"use_qk_norm": False}, "use_qk_norm"),
        ("HunYuanDenseV1ForCausalLM", {"use_cla": True}, "use_cla"),
        ("Ernie4_5ForCausalLM", {"compression_ratio": 2.0}, "compression_ratio"),
        ("Phi3ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("Gemma2ForCausalLM", {"hidden_act": "silu"}, "hidden_act"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Gemma3ForCausalLM", {"sliding_window": None}, "sliding_window is missing"),
        ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ("Cohere2ForCausalLM", {"use_qk_norm": True}, "use_qk_norm"),
        ("Cohere2ForCausalLM", {"use_parallel_block": False}, "use_parallel_block"),
        ("Olmo3ForCausalLM", {"hidden_act": "gelu"}, "hidden_act"),
        (
            "Olmo3ForCausalLM",
            {"rope_parameters": {"chunked_attention": {"rope_type": "default"}}},
            "rope_parameters: key 'chunked_attention'",
        ),
        (
            "HunYuanDenseV1ForCausalLM",
            {"rope_scaling": {"type": "yarn", "alpha": 50.0}},
            "rope_scaling: type",
        ),
    ],
)
def test_what_a_family_does_not_have_is_refused(
    family: str, over: dict[str, Any], key: str
) -> None:
    assert refusal(family, **over).startswith(f"config.json: {key}")


def test_layers_take_turns_without_layer_types() -> None:
    def windows(family: str) -> list[int | None]:
        over = {"layer_types": None, "num_hidden_layers": 8}
        return [layer.mixer.window for layer in tiny(family, **over).layers]

    w = 48
    assert windows("Olmo3ForCausalLM") == [w, w, w, None, w, w, w, None]
    assert windows("Gemma2ForCausalLM") == [w, None, w, None, w, None, w, None]
    assert windows("Gemma3ForCausalLM") == [w, w, w, w, w, None, w, w]
    assert windows("Cohere2ForCausalLM") == [w, w, w, None, w, w, w, None]
    smol = tiny("SmolLM3ForCausalLM", no_rope_layers=None, num_hidden_layers=8)
    rotated = [layer.mixer.rope is not None for layer in smol.layers]
    assert rotated == [True, True, True, False, True, True, True, False]


def test_rope_per_kind_of_layer_in_the_old_and_the_new_form() -> None:
    def ropes(family: str, **over: Any) -> list[Rope | None]:
        return [layer.mixer.rope for layer in tiny(family, **over).layers]

    linear = Rope(16, 10_000.0, scaling=LinearScaling(8.0))
    assert ropes("Gemma3ForCausalLM") == [Rope(16, 100.0), linear]
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    nothing_else = {"rope_theta": None, "rope_scaling": None, "rope_local_base_freq": None}
    assert ropes("Gemma3ForCausalLM", rope_parameters=new, **nothing_else) == [
        Rope(16, 100.0),
        linear,
    ]
    bare = make_arch({"architectures": ["Gemma3ForCausalLM"]})
    assert bare.layers[0].mixer.rope == Rope(256, 10_000.0)
    assert bare.layers[5].mixer.rope == Rope(256, 1_000_000.0)
    yarn = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
    old = ropes("Olmo3ForCausalLM", rope_scaling=yarn)
    assert old[0] == Rope(16, 500_000.0)
    assert isinstance(old[1], Rope) and isinstance(old[1].scaling, YarnScaling)


def test_a_residual_scale_needs_a_norm_before_the_layer() -> None:
    with pytest.raises(ValueError, match="residual_scale needs layers"):
        replace(tiny("Olmo2ForCausalLM"), residual_scale=0.5)


def test_layer_types_refused() -> None:
    expected = "but only a list of 2 of full_attention is supported"
    message = refusal("Qwen2ForCausalLM", layer_types=["sliding_attention"] * 2)
    assert message.endswith(expected)
    assert refusal("Qwen3ForCausalLM", layer_types=["full_attention"]).endswith(expected)
    long = refusal("Qwen3ForCausalLM", layer_types=["full_attention"] * 50)
    assert "..." in long
    assert len(long) < 200
    sliding = ["sliding_attention", "full_attention"]
    assert "layer_types is" in refusal("LlamaForCausalLM", layer_types=sliding)
    assert "layer_types is" in refusal("MistralForCausalLM", layer_types=sliding)


def test_unsupported_architecture() -> None:
    assert refusal(architectures=["GPT2LMHeadModel"]) == (
        f"config.json: architectures is ['GPT2LMHeadModel']; supported are {', '.join(FAMILIES)}"
    )
    for value in (None, [], 3, [{}], "LlamaForCausalLM"):
        assert f"architectures is {value!r}; supported" in refusal(architectures=value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 0, 1.5, True, [1]])
def test_not_a_count(value: Any) -> None:
    assert "but only a whole number from 1 to 16777216 is supported" in refusal(hidden_size=value)
    if value not in (1.5,):
        assert "but only a number above 0 is supported" in refusal(rms_norm_eps=value)


def test_whole_floats_are_counts() -> None:
    assert tiny(hidden_size=64.0).dim == 64


def write(path: Path, name: str, text: str | dict[str, Any]) -> None:
    (path / name).write_text(text if isinstance(text, str) else json.dumps(text))


def test_read_spec(tmp_path: Path) -> None:
    write(tmp_path, "config.json", tiny_config("LlamaForCausalLM", eos_token_id=5))
    assert read_arch(tmp_path) == tiny(eos_token_id=5)
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, 6, 7, 384]})
    assert read_arch(tmp_path).eos_token_ids == (7, 6)  # 384 is outside the vocabulary
    write(tmp_path, "generation_config.json", {"temperature": 0.5})
    assert read_arch(tmp_path).eos_token_ids == (5,)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "problem"), [("{", "not valid JSON ("), ("[]", "a JSON object is expected")]
)
def test_unreadable(tmp_path: Path, name: str, text: str, problem: str) -> None:
    write(tmp_path, "config.json", tiny_config("LlamaForCausalLM"))
    write(tmp_path, name, text)
    with pytest.raises(ArchError) as caught:
        read_arch(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {problem}")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ArchError, match="cannot be read"):
        read_arch(tmp_path)
