"""From config.json to a Model: defaults, old and new spellings, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log, prod
from pathlib import Path
from typing import Any

import pytest

from gllm_engine.arch import (
    FAMILIES,
    ArchError,
    Clamp,
    Dense,
    Gqa,
    Indexer,
    Mla,
    Model,
    Moe,
    QueryTemperature,
    Routing,
    families,
    make_arch,
    read_arch,
)
from gllm_engine.arch.formats import (
    FP8_ROW,
    Awq,
    CompressedInt,
    Format,
    Fp8,
    Gptq,
    Int8,
    Widened,
)
from gllm_engine.arch.model import EarlierIndexer, GatedDelta
from gllm_engine.arch.names import is_left_over
from gllm_engine.arch.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)
from gllm_engine.arch.shard import Shard
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


def test_every_module_of_families_has_an_architecture() -> None:
    folder = Path(families.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "common", "registry"}
    readers = [reader for family in FAMILIES.values() for reader in (family.read, family.vision)]
    read = {reader.__module__.rpartition(".")[2] for reader in readers if reader is not None}
    assert read == modules


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_tiny_config(family: str) -> None:
    model = tiny(family)
    layers = 3 if family == "Qwen3VLForConditionalGeneration" else 2  # one more than add embeddings
    assert (model.dim, model.vocab, len(model.layers), model.max_len) == (64, 384, layers, 2048)


def test_an_almost_empty_config_has_the_familys_defaults() -> None:
    def bare(name: str) -> Model:
        return make_arch({"architectures": [name]})

    llama = bare("LlamaForCausalLM")
    assert (llama.dim, llama.vocab, llama.max_len, llama.eos_token_ids) == (4096, 32000, 2048, (2,))
    assert llama.layers[0].mixer.kv_heads == 32
    assert bare("MistralForCausalLM").layers[0].mixer.window == 4096
    assert bare("Qwen3ForCausalLM").layers[0].mixer.window is None
    assert bare("Glm4ForCausalLM").layers[0].mixer.rope.dim == 64


# Qwen3.5-27B, as published.
HYBRID_27B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "tie_word_embeddings": False,
    "image_token_id": 248056,
    "vision_config": {"depth": 27, "hidden_size": 1152, "out_hidden_size": 5120},
    "text_config": {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 24,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "output_gate_type": "swish",
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000,
            "rope_type": "default",
        },
        "vocab_size": 248320,
    },
}


def test_hybrid_27b() -> None:
    model = make_arch(HYBRID_27B)
    delta = GatedDelta(k_heads=16, v_heads=48, k_dim=128, v_dim=128, conv=4)
    rope = Rope(64, 1e7, sections=(11, 11, 10), sections_interleaved=True)
    attention = Gqa(24, 4, 256, rope, qk_norm="head", output_gate=True)
    assert [layer.mixer for layer in model.layers] == [delta] * 3 + [attention]
    assert {layer.ffn for layer in model.layers} == {Dense(17408)}
    assert (model.norm, model.eps, model.max_len) == ("rms_plus_one", 1e-6, 262144)
    assert (model.eos_token_ids, model.tie, model.vocab) == ((248044,), False, 248320)
    # 3 MiB of matrices a layer, and the convolution's inputs.
    (matrices, inputs) = delta.state_shapes
    assert (prod(matrices) * 4, inputs) == (3 << 20, (10240, 3))
    whole = make_arch(HYBRID_27B | {"tie_word_embeddings": True})
    assert whole.tie
    bare = make_arch({"architectures": ["Qwen3NextForCausalLM"]})
    kinds = [isinstance(layer.mixer, GatedDelta) for layer in bare.layers]
    assert kinds == [True, True, True, False] * 12
    assert bare.layers[0].ffn.num_experts == 512


@pytest.mark.parametrize(
    ("family", "over", "key"),
    [
        ("Qwen3NextForCausalLM", {"linear_num_value_heads": 6}, "linear_num_value_heads is 6"),
        ("Qwen3NextForCausalLM", {"linear_conv_kernel_dim": 5}, "linear_conv_kernel_dim is 5"),
        ("Qwen3NextForCausalLM", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("Qwen3NextForCausalLM", {"layer_types": ["sliding_attention"] * 2}, "layer_types is"),
        ("Qwen3NextForCausalLM", {"num_key_value_heads": 3}, "cannot share 3 key/value heads"),
        ("Qwen3_5ForCausalLM", {"attn_output_gate": False}, "attn_output_gate is False"),
        ("Qwen3_5ForCausalLM", {"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
        ("Qwen3_5ForCausalLM", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16'"),
        ("Qwen3_5MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("Qwen3_5MoeForCausalLM", {"mlp_only_layers": [1]}, "mlp_only_layers is [1]"),
        (
            "Qwen3_5ForConditionalGeneration",
            {"hidden_act": "gelu"},
            "config.json: text_config: hidden_act is 'gelu'",
        ),
    ],
)
def test_what_no_hybrid_computes_is_refused(family: str, over: dict[str, Any], key: str) -> None:
    assert key in refusal(family, **over)


def test_a_model_for_images_needs_the_description_of_its_text_part() -> None:
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"]}
    for wrong in ({}, {"text_config": {}}, {"text_config": 5}, {"text_config": None}):
        with pytest.raises(ArchError, match="text_config"):
            make_arch(config | wrong)


def test_heads_of_cohere_are_as_wide_as_the_model_together() -> None:
    config = {"architectures": ["Cohere2ForCausalLM"], "hidden_size": 4096}
    assert make_arch(config).layers[0].mixer.head_dim == 64


def test_null_is_no_value_and_no_default() -> None:
    assert tiny("MistralForCausalLM", sliding_window=None).layers[0].mixer.window is None
    assert tiny(num_key_value_heads=None).layers[0].mixer.kv_heads == 4
    assert tiny(head_dim=None).layers[0].mixer.head_dim == 16
    assert tiny(eos_token_id=None).eos_token_ids == ()
    assert refusal(hidden_size=None) == "config.json: hidden_size is missing"
    # As a truth value it is false, where absence may mean true.
    assert tiny("GPTNeoXForCausalLM", use_parallel_residual=None).layers[0].place == "pre"
    for family in ("Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"):
        assert tiny(family, norm_topk_prob=None).layers[0].ffn.routing.renorm


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


def test_which_layers_have_experts() -> None:
    """A list overrides first_k_dense_replace."""
    kinds = ["sparse", "dense", "sparse"]
    model = tiny("GlmMoeDsaForCausalLM", num_hidden_layers=3, mlp_layer_types=kinds)
    assert [isinstance(layer.ffn, Moe) for layer in model.layers] == [True, False, True]
    assert refusal("DeepseekV32ForCausalLM", mlp_layer_types=["sparse"]) == (
        "config.json: mlp_layer_types is ['sparse'], "
        "but only a list of 2 of dense, sparse is supported"
    )


def indexer_of(model: Model) -> Indexer | None:
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Mla)
    assert all(layer.mixer == mixer for layer in model.layers)
    return mixer.indexer


def test_sparse_attention() -> None:
    v32 = indexer_of(tiny("DeepseekV32ForCausalLM"))
    assert v32 == Indexer(16, 24, Rope(16, 10_000.0), 12)
    glm = indexer_of(tiny("GlmMoeDsaForCausalLM"))
    assert glm == replace(v32, rope=Rope(16, 10_000.0, interleaved=True))
    assert indexer_of(tiny("GlmMoeDsaForCausalLM", indexer_rope_interleave=False)) == v32
    assert indexer_of(tiny("DeepseekV32ForCausalLM", indexer_rope_interleave=True)) == glm
    assert indexer_of(tiny("DeepseekV3ForCausalLM")) is None
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    scaled = tiny("DeepseekV32ForCausalLM", rope_scaling=scaling)
    assert indexer_of(scaled).rope == replace(scaled.layers[0].mixer.rope, interleaved=False)


def test_sparse_attention_at_full_size() -> None:
    """The defaults are those of the published models."""
    v32 = make_arch({"architectures": ["DeepseekV32ForCausalLM"]})
    assert indexer_of(v32) == Indexer(64, 128, Rope(64, 10_000.0), 2048)
    assert (len(v32.layers), v32.layers[0].mixer.heads, v32.max_len) == (61, 128, 163840)
    glm = make_arch({"architectures": ["GlmMoeDsaForCausalLM"]})
    assert indexer_of(glm) == Indexer(32, 128, Rope(64, 10_000.0, interleaved=True), 2048)
    assert (len(glm.layers), glm.layers[0].mixer.heads, glm.max_len) == (78, 64, 202752)
    # A token's latent, rotated key and index key, of each layer.
    assert v32.kv_bytes_per_token(2) == 2 * 61 * (512 + 64 + 128)


def layers_with_an_indexer(num_layers: int, **over: Any) -> list[int]:
    model = tiny("GlmMoeDsaForCausalLM", num_hidden_layers=num_layers, **over)
    assert model.unknown_keys == ()
    indexers = [layer.mixer.indexer for layer in model.layers]
    assert {*indexers} <= {indexers[0], EarlierIndexer(12)}
    return [i for i, indexer in enumerate(indexers) if isinstance(indexer, Indexer)]


def test_layers_that_share_an_indexer() -> None:
    """By a list, by letters, or by a rule; GLM-5.2 has the rule and the list."""
    kinds = ["full", "shared", "shared", "full", "shared"]
    assert layers_with_an_indexer(5, indexer_types=kinds) == [0, 3]
    assert layers_with_an_indexer(5, index_topk_pattern="FSSFS") == [0, 3]
    assert layers_with_an_indexer(5, index_topk_pattern=kinds) == [0, 3]
    assert layers_with_an_indexer(5, index_topk_freq=1, index_skip_topk_offset=3) == [*range(5)]
    assert layers_with_an_indexer(9, index_topk_freq=3) == [0, 1, 4, 7]
    published = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    own = [0, 1, *range(2, 78, 4)]
    assert layers_with_an_indexer(78, **published) == own and len(own) == 21
    types = ["full" if i in own else "shared" for i in range(78)]
    assert layers_with_an_indexer(78, **published, indexer_types=types) == own


def test_layers_that_share_an_indexer_stay_together() -> None:
    model = tiny("GlmMoeDsaForCausalLM", num_hidden_layers=9, index_topk_freq=3)
    runs = model.runs()
    assert [len(run) for run in runs] == [1, 3, 3, 2]
    assert sum(runs, ()) == model.layers
    plain = tiny("GlmMoeDsaForCausalLM", num_hidden_layers=9)
    assert plain.runs() == [(layer,) for layer in plain.layers]
    # A token's latent and rotated key of each layer, and the index keys of four.
    assert model.kv_bytes_per_token(2) == 2 * (9 * (32 + 16) + 4 * 24)
    for first in (0, 1, 4, 7):
        Shard(first, 9).weights(model)
    for first in (2, 3, 5, 6, 8):
        with pytest.raises(ValueError, match="first layer of a model or a pipeline stage"):
            Shard(first, 9).weights(model)


@pytest.mark.parametrize("family", ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"])
@pytest.mark.parametrize(
    ("over", "message"),
    [
        (
            {"indexer_types": ["full", "half"]},
            "indexer_types is ['full', 'half'], but only a list of 2 of full, shared is supported",
        ),
        (
            {"indexer_types": ["shared", "full"]},
            "indexer_types gives the first layer no indexer, but there is none before",
        ),
        (
            {"index_topk_pattern": "FSS"},
            "index_topk_pattern is 'FSS', but only a list of 2 of F, S, full, shared is supported",
        ),
        (
            {"index_topk_freq": 2, "index_skip_topk_offset": 0, "indexer_types": ["full"] * 2},
            "index_topk_freq and indexer_types disagree about which layers have an indexer",
        ),
        (
            {"index_topk_freq": 0},
            "index_topk_freq is 0, but only a whole number from 1 to 16777216 is supported",
        ),
        ({"q_lora_rank": None}, "q_lora_rank is missing, but the indexer needs it"),
        (
            {"index_head_dim": 12},
            "index_head_dim is 12, but only 16 or more is supported, the qk_rope_head_dim",
        ),
        (
            {"index_topk": 0},
            "index_topk is 0, but only a whole number from 1 to 16777216 is supported",
        ),
        (
            {"indexer_rope_interleave": 1},
            "indexer_rope_interleave is 1, but only true or false is supported",
        ),
        (
            {"layer_types": ["full_attention"] * 2},
            "layer_types is ['full_attention', 'full_attention'], "
            "but only a list of 2 of indexed_attention, deepseek_sparse_attention is supported",
        ),
        ({"attention_bias": True}, "attention_bias is True, but only false is supported"),
    ],
)
def test_sparse_attention_refused(family: str, over: dict[str, Any], message: str) -> None:
    assert refusal(family, **over) == f"config.json: {message}"


# What configs of the hub say, without keys that change nothing.
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
    "eos_token_id": 100001,
}
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "vocab_size": 163840,
}
DEEPSEEK_R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
    "eos_token_id": 1,
}
KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 2048,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}


def test_deepseek_v2_lite() -> None:
    model = make_arch(V2_LITE)
    assert model.num_params() == 15_706_484_224
    assert model.kv_bytes_per_token(itemsize=2) == 27 * 2 * (512 + 64)
    assert (model.max_len, model.extra_layers) == (163840, 0)
    assert [layer.ffn for layer in model.layers[:2]] == [
        Dense(10944),
        Moe(64, 1408, Routing(6, renorm=False), shared=2816),
    ]
    mixer = model.layers[0].mixer
    assert (mixer.q_rank, mixer.kv_rank, mixer.latent_eps) == (None, 512, 1e-6)
    assert mixer.scale == pytest.approx(192**-0.5 * (0.0707 * log(40) + 1) ** 2)
    assert mixer.rope.interleaved


def test_deepseek_v2() -> None:
    routing = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    more = {"n_routed_experts": 160, "routed_scaling_factor": 16.0, "q_lora_rank": 1536}
    model = make_arch(V2_LITE | routing | more)
    expected = Routing(6, renorm=False, groups=8, kept_groups=3, scale=16.0)
    assert model.layers[1].ffn.routing == expected
    assert model.layers[0].mixer.q_rank == 1536
    # Groups are of one method alone.
    plain = make_arch(V2_LITE | routing | {"topk_method": "greedy"})
    assert plain.layers[1].ffn.routing == Routing(6, renorm=False)


def test_deepseek_r1_and_v3_1() -> None:
    model = make_arch(DEEPSEEK_R1)
    routing = Routing(8, True, "sigmoid", True, 8, 4, sum_eps=1e-20, scale=2.5)
    assert [layer.ffn for layer in model.layers[2:4]] == [
        Dense(18432),
        Moe(256, 2048, routing, shared=2048),
    ]
    assert model.num_params() == pytest.approx(671.03e9, rel=1e-4)
    assert is_left_over(model, "model.layers.61.shared_head.head.weight")
    mixer = model.layers[60].mixer
    assert mixer.scale == pytest.approx(192**-0.5 * (0.1 * log(40) + 1) ** 2)
    of_v3_1 = DEEPSEEK_R1["quantization_config"] | {"scale_fmt": "ue8m0"}
    assert make_arch(DEEPSEEK_R1 | {"quantization_config": of_v3_1}) == model


def test_moonlight() -> None:
    model = make_arch(MOONLIGHT)
    routing = Routing(6, True, "sigmoid", True, sum_eps=1e-20, scale=2.446)
    assert model.layers[26].ffn == Moe(64, 1408, routing, shared=2816)
    mixer = model.layers[0].mixer
    assert (mixer.q_rank, mixer.latent_eps, model.eps) == (None, 1e-6, 1e-5)
    assert mixer.scale == 192**-0.5
    assert mixer.rope == Rope(64, 50_000.0, interleaved=True)
    assert model.num_params() == 15_960_110_208


def test_kimi_k2() -> None:
    model = make_arch(KIMI_K2)
    assert model == make_arch(KIMI_K2 | {"architectures": ["KimiK2ForCausalLM"]})
    routing = Routing(8, True, "sigmoid", True, sum_eps=1e-20, scale=2.827)
    assert [layer.ffn for layer in model.layers[:2]] == [
        Dense(18432),
        Moe(384, 2048, routing, shared=2048),
    ]
    mixer = model.layers[60].mixer
    assert (mixer.heads, mixer.q_rank) == (64, 1536)
    assert mixer.scale == pytest.approx(192**-0.5 * (0.1 * log(32) + 1) ** 2)
    assert model.num_params() == pytest.approx(1.026e12, rel=1e-3)
    assert not is_left_over(model, "model.layers.61.eh_proj.weight")


def test_kimi_k25() -> None:
    """The text model is described by an object of its own, and is Kimi K2's."""
    text = {key: value for key, value in KIMI_K2.items() if key != "architectures"}
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {"vt_hidden_size": 1152},
    }
    model = make_arch(config)
    kimi_k2 = make_arch(KIMI_K2)
    assert replace(model, names=kimi_k2.names, vision=None) == kimi_k2
    assert make_arch(config | {"architectures": ["Kimi_K25ForConditionalGeneration"]}) == model
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    of_text = make_arch(config | {"text_config": text | {"quantization_config": fp8}})
    assert of_text == make_arch(config | {"quantization_config": fp8})
    assert of_text.quantization
    with pytest.raises(ArchError, match="^config.json: text_config is missing"):
        make_arch(config | {"text_config": None})
    with pytest.raises(ArchError, match="^config.json: text_config: moe_layer_freq is 2, but"):
        make_arch(config | {"text_config": text | {"moe_layer_freq": 2}})


def test_gpt_oss_20b() -> None:
    config = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "eos_token_id": 200002,
        "vocab_size": 201088,
    }
    model = make_arch(config)
    assert model.num_params() == 20_914_757_184
    assert model.max_len == 131072
    moe = Moe(32, 2880, Routing(4, True), router_bias=True, bias=True, out_bias=True,
              clamp=Clamp(7.0, 1.702))  # fmt: skip
    assert {layer.ffn for layer in model.layers} == {moe}
    scaling = YarnScaling(32.0, 4096, None, None, None, 32.0, 1.0, truncate=False)
    mixer = Gqa(64, 8, 64, Rope(64, 150_000.0, scaling=scaling), True, True, sinks=True)
    assert [layer.mixer for layer in model.layers] == [replace(mixer, window=128), mixer] * 12
    # Without a key of its own, the same rope.
    assert make_arch(config | {"rope_scaling": None}) == model
    assert refusal("GptOssForCausalLM", experts_per_token=3) == (
        "config.json: experts_per_token is 3, but only 2 is supported"
    )


FP8 = {"quantization_config": {"quant_method": "fp8"}}
LLAMA4_SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": 4,
        "eos_token_id": [200001, 200007, 200008],
        "floor_scale": 8192,
        "head_dim": 128,
        "hidden_size": 5120,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "moe_layers": list(range(48)),
        "no_rope_layers": [1, 1, 1, 0] * 12,
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "tie_word_embeddings": False,
    "vision_config": {"model_type": "llama4_vision_model"},
}


def test_llama4_scout() -> None:
    model = make_arch(LLAMA4_SCOUT)
    assert round(model.num_params() / 1e9, 2) == 107.77
    assert (model.max_len, model.eos_token_ids) == (10485760, (200001, 200007, 200008))
    routing = Routing(1, renorm=False, scoring="sigmoid")
    assert {layer.ffn for layer in model.layers} == {
        Moe(16, 8192, routing, shared=8192, on_input=True)
    }
    rope = Rope(128, 500_000.0, True, Llama3Scaling(16.0, 1.0, 1.0, 8192))
    mixer = Gqa(40, 8, 128, rope)
    chunked = replace(mixer, window=8192, chunked=True, qk_norm="l2_after")
    whole = replace(mixer, rope=None, temperature=QueryTemperature(0.1, 8192, offset=1))
    assert [layer.mixer for layer in model.layers] == [chunked, chunked, chunked, whole] * 12


def test_llama4_layers() -> None:
    def kinds(**over: Any) -> list[tuple[bool, bool, bool]]:
        """Of each layer: chunked, rotated, with experts."""
        model = tiny("Llama4ForCausalLM", num_hidden_layers=4, **over)
        return [
            (layer.mixer.chunked, layer.mixer.rope is not None, isinstance(layer.ffn, Moe))
            for layer in model.layers
        ]

    default = {"no_rope_layers": None, "interleave_moe_layer_step": None}
    assert kinds(**default | {"interleave_moe_layer_step": 1}) == [(True, True, True)] * 3 + [
        (False, False, True)
    ]
    assert [experts for *_, experts in kinds(no_rope_layers=None)] == [False, True, False, True]
    assert [experts for *_, experts in kinds(no_rope_layers=[], moe_layers=[0])] == [
        True, False, False, False,
    ]  # fmt: skip
    assert not any(experts for *_, experts in kinds(no_rope_layers=[], moe_layers=[]))
    types = ["chunked_attention", "full_attention"] * 2
    found = kinds(no_rope_layers=[0, 0, 1, 1], layer_types=types)
    assert [(chunked, turned) for chunked, turned, _ in found] == [
        (True, False), (False, False), (True, True), (False, True),
    ]  # fmt: skip
    assert not any(chunked for chunked, *_ in kinds(no_rope_layers=[], attention_chunk_size=None))
    untempered = tiny("Llama4ForCausalLM", attn_temperature_tuning=False)
    assert [layer.mixer.temperature for layer in untempered.layers] == [None, None]
    assert tiny("Llama4ForCausalLM", use_qk_norm=False).layers[0].mixer.qk_norm is None


def test_a_model_with_vision_has_its_language_models_keys_within() -> None:
    config = tiny_config("Llama4ForConditionalGeneration", hidden_size=32)
    text = tiny_config("Llama4ForCausalLM", hidden_size=32)
    model = make_arch(config)
    assert model == replace(make_arch(text), names=model.names)

    def refused(**over: Any) -> str:
        with pytest.raises(ArchError) as caught:
            make_arch(config | over)
        return str(caught.value)

    missing = "config.json: text_config is missing, the text model's description"
    assert refused(text_config=None) == missing
    assert refused(text_config=text | {"hidden_act": "gelu"}) == (
        "config.json: text_config: hidden_act is 'gelu', but only \"silu\" is supported"
    )
    assert make_arch(config | {"tie_word_embeddings": True}).tie
    expected = replace(make_arch(text | FP8), names=model.names)
    assert make_arch(config | FP8) == expected
    assert make_arch(config | {"text_config": text | FP8}) == expected


def test_minimax_m2() -> None:
    config = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * 62,
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "max_position_embeddings": 196608,
        "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1,
        "num_attention_heads": 48,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 62,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": 200064,
    }
    model = make_arch(config)
    assert round(model.num_params() / 1e9, 2) == 228.69
    assert {layer.mixer for layer in model.layers} == {
        Gqa(48, 8, 128, Rope(64, 5_000_000.0), qk_norm="whole")
    }
    assert {layer.ffn for layer in model.layers} == {
        Moe(256, 1536, Routing(8, True, "sigmoid", biased=True))
    }
    assert model.extra_layers == 3


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
            "DeepseekV2ForCausalLM",
            {"topk_method": "noaux_tc"},
            'topk_method is \'noaux_tc\', but only "greedy" or "group_limited_greedy" is supported',
        ),
        (
            "DeepseekV2ForCausalLM",
            {"norm_topk_prob": True},
            "norm_topk_prob is True, but only false is supported",
        ),
        (
            "DeepseekV2ForCausalLM",
            {"scoring_func": "sigmoid"},
            "scoring_func is 'sigmoid', but only \"softmax\" is supported",
        ),
        (
            "DeepseekV2ForCausalLM",
            {"num_experts_per_tok": None},
            "num_experts_per_tok is missing",
        ),
        (
            "DeepseekV3ForCausalLM",
            {"topk_method": "group_limited_greedy"},
            "topk_method is 'group_limited_greedy', but only \"noaux_tc\" is supported",
        ),
        (
            "Llama4ForCausalLM",
            {"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 2},
            "attention_chunk_size is missing",
        ),
        (
            "Llama4ForCausalLM",
            {"attn_temperature_tuning": "on"},
            "attn_temperature_tuning is 'on', but only true, false or a whole number is supported",
        ),
        (
            "Llama4ForCausalLM",
            {"no_rope_layers": [1, 0, 1]},
            "no_rope_layers is [1, 0, 1], but only a list of 2 of 0 and 1 is supported",
        ),
        (
            "MiniMaxM2ForCausalLM",
            {"attn_type_list": [1, 0]},
            "attn_type_list is [1, 0], but only [1, 1] is supported",
        ),
        (
            "MiniMaxM2ForCausalLM",
            {"qk_norm_type": "per_head"},
            "qk_norm_type is 'per_head', but only \"per_layer\" is supported",
        ),
        (
            "GptOssForCausalLM",
            {"sliding_window": None},
            "sliding_window is missing",
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


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"bits": 3}, "bits is 3; supported are 4 and 8"),
        ({"bits": None}, "bits is missing"),
        ({"group_size": None}, "group_size is missing"),
        ({"group_size": 16}, "group_size is 16; supported are multiples of 32, and -1, one group"),
        ({"group_size": 0}, "group_size is 0; supported are multiples of 32, and -1, one group"),
        ({"group_size": -2}, "group_size is -2, but only a whole number from -1 to 16777216 is"),
        ({"desc_act": "yes"}, "desc_act is 'yes', but only true or false is supported"),
        ({"sym": 1}, "sym is 1, but only true or false is supported"),
        (
            {"checkpoint_format": "marlin"},
            "checkpoint_format is 'marlin'; supported are gptq, gptq_v2",
        ),
        ({"format": "bitblas"}, "format is 'bitblas'; supported are gptq, gptq_v2"),
        ({"is_marlin_format": True}, "is_marlin_format is True, but only false is supported"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16', but only \"int32\" is supported"),
        (
            {"dynamic": {"-:.*mtp.*": {}, "+:.*down.*": {"bits": 8}}},
            "dynamic: '+:.*down.*' changes the format of some modules, which is not supported; a "
            'rule that begins with "-:" leaves modules plain',
        ),
        ({"dynamic": ["lm_head"]}, "dynamic is ['lm_head'], but only an object is supported"),
    ],
)
def test_gptq_refused(over: dict[str, Any], message: str) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True} | over
    expected = f"config.json: quantization_config: {message}"
    assert refusal("LlamaForCausalLM", quantization_config=config).startswith(expected)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"bits": 8}, "bits is 8, but of AWQ only 4 is supported"),
        ({"w_bit": 3}, "w_bit is 3; supported are 4 and 8"),
        ({"q_group_size": 100}, "q_group_size is 100; supported are multiples of 32"),
        ({"zero_point": False}, "zero_point is False, but only true is supported"),
        ({"version": "GEMV"}, "version is 'gemv'; supported are gemm"),
        ({"version": None, "format": "gemv_fast"}, "format is 'gemv_fast'; supported are gemm"),
        ({"backend": "llm-awq"}, "backend is 'llm-awq', whose tensors are not supported"),
    ],
)
def test_awq_refused(over: dict[str, Any], message: str) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"} | over
    expected = f"config.json: quantization_config: {message}"
    assert refusal("LlamaForCausalLM", quantization_config=config).startswith(expected)


def test_whole_numbers_in_configs() -> None:
    """Published configs, with keys that tools write and nobody needs."""

    def promised(**config: Any) -> Format:
        (kind,) = tiny(quantization_config=config).quantization
        return kind

    old = {"quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.1, "sym": True}
    old |= {"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model"}
    assert promised(**old, desc_act=False) == Gptq(128)
    assert promised(**old, desc_act=True) == Widened(Gptq(128, reordered=True))
    assert promised(**old, desc_act=True, static_groups=True) == Gptq(128)
    assert promised(**old | {"group_size": -1}, desc_act=True) == Gptq(0)
    assert promised(**old, checkpoint_format="gptq_v2") == Gptq(128, less_one=False)
    assert promised(**old | {"bits": 8}) == Widened(Gptq(128, bits=8))
    rules = {"lm_head": {}, "-:.*attn.*": {}, "-:.*shared_expert.*": {}}
    assert promised(**old | {"sym": False}, dynamic=rules) == Gptq(128, zeros=True)
    awq = {"quant_method": "awq", "zero_point": True, "modules_to_not_convert": None}
    assert promised(**awq, bits=4, group_size=128, version="GEMM") == Awq(128)
    assert promised(**awq, w_bit=4, q_group_size=64, version="gemm") == Awq(64)
    plain = {"transform_config": {}, "sparsity_config": {}, "kv_cache_scheme": None}
    config = packed(symmetric=False, group_size=128) | plain
    assert promised(**config) == CompressedInt(128, zeros=True)
    whole = packed(strategy="channel", group_size=None, num_bits=8)
    assert promised(**whole) == Widened(CompressedInt(0, bits=8))


def test_how_older_tools_describe_compressed_tensors() -> None:
    """An object within, formats by names that nobody writes today, and a KV cache alone."""

    def promised(**over: Any) -> tuple[Format, ...]:
        return tiny(quantization_config=packed() | over).quantization

    inner = {"quantization_config": packed(), "sparsity_config": {}}
    outer = {"quant_method": "compressed-tensors"}
    assert tiny(quantization_config=outer | inner).quantization == (CompressedInt(32),)
    float8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    int8 = float8 | {"type": "int"}
    for weights, kind in ((float8, FP8_ROW), (int8, Widened(Int8()))):
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        assert promised(format="naive-quantized", config_groups=groups) == (kind,)
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    assert promised(format="dense", config_groups={}, kv_cache_scheme=scheme) == ()
    config = packed() | {"format": "dense"}
    assert "group_0: format is 'dense', but only " in refusal(
        "LlamaForCausalLM", quantization_config=config
    )


def test_groups_of_several_formats() -> None:
    """As published for GLM-5 and Kimi: each group tells its own, or the config tells it of all."""
    float8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    groups: dict[str, Any] = {
        "group_0": {"targets": ["re:.*self_attn.*"], "weights": float8},
        "group_1": {"targets": ["re:.*experts.*"], "weights": int4, "format": "pack-quantized"},
        "group_2": {"targets": ["re:.*k_proj"], "weights": None, "output_activations": float8},
    }
    compressed = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
    both = (Fp8(128, 128), CompressedInt(128))
    assert tiny(quantization_config=compressed | {"config_groups": groups}).quantization == both
    groups["group_0"]["format"] = "float-quantized"
    assert tiny(quantization_config=compressed | {"config_groups": groups}).quantization == both
    groups["group_0"] = {"weights": int4 | {"num_bits": 8}}
    older = compressed | {"format": "pack-quantized", "config_groups": groups}
    both = (Widened(CompressedInt(128, bits=8)), CompressedInt(128))
    assert tiny(quantization_config=older).quantization == both
    groups["group_0"] = {"weights": int4}  # the same in two groups
    assert tiny(quantization_config=older).quantization == (CompressedInt(128),)


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


def test_yarn_as_its_authors_write_it() -> None:
    def scaling(**over: Any) -> YarnScaling:
        found = rope_of(tiny(rope_scaling={"type": "yarn", "factor": 4.0} | over)).scaling
        assert isinstance(found, YarnScaling)
        return found

    plain = scaling()
    assert scaling(attn_factor=1.0, extrapolation_factor=1, apply_yarn_scaling=True) == plain
    assert scaling(attn_factor=0.5) == replace(plain, derived_times=0.5)
    unscaled = scaling(attn_factor=0.5, apply_yarn_scaling=False)
    assert unscaled.attention_factor == 0.5
    assert scaling(apply_yarn_scaling=False).attention_factor == 1
    given = scaling(attention_factor=0.75, apply_yarn_scaling=False)
    assert given.attention_factor == 0.75


def test_early_names_of_longrope() -> None:
    kinds = ("longrope", "su", "yarn")
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    models = [tiny("Phi3ForCausalLM", rope_scaling={"type": kind} | factors) for kind in kinds]
    assert len(set(models)) == 1 and isinstance(rope_of(models[0]).scaling, LongRopeScaling)


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
            {"rope_scaling": {"type": "yarn", "attn_factor": 2.0, "attention_factor": 1.0}},
            "config.json: rope_scaling: attn_factor is 2.0, "
            "but beside attention_factor only 1 is supported",
        ),
        (
            {"rope_scaling": {"type": "yarn", "extrapolation_factor": 0.5}},
            "config.json: rope_scaling: extrapolation_factor is 0.5, but only 1 is supported",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "attn_factor": 2.0}},
            "config.json: rope_scaling: key 'attn_factor' is not supported",
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
            {"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}},
            "config.json: quantization_config: quant_method is 'bitsandbytes'; "
            "supported are fp8, fbgemm_fp8, compressed-tensors, modelopt, mxfp4, gptq, awq",
        ),
        (
            {"quantization_config": "fp8"},
            "config.json: quantization_config is 'fp8', but only an object is supported",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "config.json: quantization_config: quant_method is ''; "
            "supported are fp8, fbgemm_fp8, compressed-tensors, modelopt, mxfp4, gptq, awq",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
            "config.json: quantization_config: fmt is 'e5m2', "
            'but only "e4m3" or "float8_e4m3fn" is supported',
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "none"}},
            "config.json: quantization_config: activation_scheme is 'none', "
            'but only "dynamic" or "static" is supported',
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
            "config.json: quantization_config: weight_block_size is [128, 0], "
            "but only a list of 2 whole numbers from 1 to 16777216 is supported",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "config.json: quantization_config: quant_algo is 'NVFP4', but only "
            '"FP8" or "FP8_PER_CHANNEL_PER_TOKEN" or "FP8_PB_WO" is supported',
        ),
        (
            {"quantization_config": COMPRESSED | {"format": "nvfp4-pack-quantized"}},
            "config.json: quantization_config: format is 'nvfp4-pack-quantized', "
            'but only "float-quantized" or "pack-quantized" or "int-quantized" or '
            '"mixed-precision" or "naive-quantized" or "dense" is supported',
        ),
        (
            {"quantization_config": packed(group_size=48)},
            "config.json: quantization_config: config_groups: group_0: weights: "
            "group_size is 48; supported are multiples of 32, and -1, one group of all columns",
        ),
        (
            {"quantization_config": packed(num_bits=3)},
            "config.json: quantization_config: config_groups: group_0: weights: "
            "num_bits is 3; supported are 4 and 8",
        ),
        (
            {"quantization_config": packed(strategy="tensor")},
            "config.json: quantization_config: config_groups: group_0: weights: "
            'strategy is \'tensor\', but only "group" or "channel" is supported',
        ),
        (
            {"quantization_config": packed() | {"transform_config": {"config_groups": {"R4": {}}}}},
            "config.json: quantization_config: transform_config is not supported: inputs would be "
            "rotated",
        ),
        (
            {"quantization_config": packed(actorder="random")},
            "config.json: quantization_config: config_groups: group_0: weights: "
            "actorder is 'random', "
            'but only "static" or "weight" or "group" or "dynamic" is supported',
        ),
        (
            {"quantization_config": COMPRESSED | {"config_groups": {}}},
            "config.json: quantization_config: config_groups has no group with weights",
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


NESTED_YARN = {"full_attention": {"rope_type": "yarn", "factor": 8.0, "truncate": False}}


@pytest.mark.parametrize(
    ("family", "over", "key"),
    [
        ("DeepseekV2ForCausalLM", {"mlp_bias": True}, "mlp_bias"),
        ("DeepseekV2ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("DeepseekV2ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("DeepseekV2ForCausalLM", {"rope_interleave": False}, "rope_interleave"),
        ("DeepseekV3ForCausalLM", {"num_key_value_heads": 2}, "num_key_value_heads"),
        (
            "DeepseekV3ForCausalLM",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
            "rope_scaling: mscale_all_dim",
        ),
        ("GPT2LMHeadModel", {"activation_function": "relu"}, "activation_function"),
        ("GPT2LMHeadModel", {"scale_attn_weights": False}, "scale_attn_weights"),
        (
            "GPT2LMHeadModel",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx",
        ),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention"),
        ("GPT2LMHeadModel", {"n_head": 5}, "n_head is 5, but it must divide n_embd=64"),
        ("GPTBigCodeForCausalLM", {"multi_query": False}, "multi_query"),
        ("GPTNeoXForCausalLM", {"hidden_act": "relu"}, "hidden_act"),
        ("GPTNeoXForCausalLM", {"hidden_size": 66}, "num_attention_heads is 4, but it must"),
        ("GPTNeoXForCausalLM", {"rotary_pct": 0.3}, "partial_rotary_factor=0.3 of head_dim=16"),
        ("SmolLM3ForCausalLM", {"use_sliding_window": True}, "use_sliding_window"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("HunYuanDenseV1ForCausalLM", {"use_qk_norm": False}, "use_qk_norm"),
        ("HunYuanDenseV1ForCausalLM", {"use_cla": True}, "use_cla"),
        ("HunYuanMoEV1ForCausalLM", {"mlp_bias": True}, "mlp_bias"),
        ("HunYuanMoEV1ForCausalLM", {"moe_drop_tokens": True}, "moe_drop_tokens"),
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
        ("Olmo3ForCausalLM", {"rope_theta": 10_000.0}, "rope_theta is 10000.0"),
        (
            "Gemma3ForCausalLM",
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling: rope_type is missing",
        ),
        ("Gemma3ForCausalLM", {"rope_parameters": NESTED_YARN}, "rope_scaling"),
        (
            "Gemma3ForCausalLM",
            {"rope_scaling": None, "rope_parameters": NESTED_YARN},
            "rope_parameters: full_attention: truncate",
        ),
        (
            "Gemma3ForConditionalGeneration",
            {"final_logit_softcapping": 30.0},
            "text_config: final_logit_softcapping",
        ),
        ("Qwen3VLMoeForConditionalGeneration", {"norm_topk_prob": False}, "text_config: norm"),
        ("Ernie4_5_MoeForCausalLM", {"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("GPT2LMHeadModel", {"num_attention_heads": 2}, "num_attention_heads"),
        ("GPTBigCodeForCausalLM", {"num_attention_heads": 2}, "num_attention_heads"),
    ],
)
def test_what_a_family_does_not_have_is_refused(
    family: str, over: dict[str, Any], key: str
) -> None:
    assert refusal(family, **over).startswith(f"config.json: {key}")


# Families in which transformers rotates a share of the channels, and those without RoPE.
SHARES = ("Glm", "Qwen3Next", "Qwen3_5", "Phi3", "MiniMax", "GPT", "ChatGLM")


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith(SHARES)])
def test_a_share_of_rotated_channels_where_all_are_rotated(family: str) -> None:
    inside = {"rope_type": "default", "partial_rotary_factor": 0.5}
    if family.startswith(("Gemma3", "Olmo3")):
        inside = {"full_attention": inside}
    over = {"rope_scaling": None, "partial_rotary_factor": None}
    message = "partial_rotary_factor is 0.5, but only 1 is supported"
    assert message in refusal(family, **over | {"rope_parameters": inside})
    over["rope_parameters"] = None
    assert message in refusal(family, **over | {"partial_rotary_factor": 0.5})


def test_the_experts_of_hunyuan_may_differ_from_layer_to_layer() -> None:
    def sizes(**over: Any) -> list[tuple[int, int, int, int]]:
        ffns = [layer.ffn for layer in tiny("HunYuanMoEV1ForCausalLM", **over).layers]
        return [(f.num_experts, f.routing.top_k, f.hidden, f.shared) for f in ffns]

    assert sizes() == [(8, 2, 96, 96)] * 2
    assert sizes(num_experts=[8, 4], moe_topk=[3, 4]) == [(8, 3, 96, 96), (4, 4, 96, 96)]
    widths = {"moe_intermediate_size": [32, 48], "num_shared_expert": [2, 1]}
    assert sizes(**widths) == [(8, 2, 32, 64), (8, 2, 48, 48)]
    assert sizes(**widths, use_mixed_mlp_moe=False) == [(8, 2, 32, 0), (8, 2, 48, 0)]
    assert "moe_topk is 4, but only 1 to 3" in refusal(
        "HunYuanMoEV1ForCausalLM", num_experts=[8, 3], moe_topk=[8, 4]
    )


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
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
    old = ropes("Olmo3ForCausalLM", rope_scaling=yarn | {"rope_theta": 77.0})
    assert old[0] == Rope(16, 500_000.0)
    assert isinstance(old[1], Rope) and old[1].theta == 77.0
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


def test_gpt2() -> None:
    model = make_arch({"architectures": ["GPT2LMHeadModel"]})
    assert model.num_params() == 124_439_808
    assert (model.positions, model.max_len, model.norm, model.tie) == (1024, 1024, "layer", True)
    mixer = model.layers[11].mixer
    assert (mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.rope) == (12, 12, 64, None)
    assert model.layers[0].ffn == Dense(3072, True, True, act="gelu_tanh", gated=False)
    assert tiny("GPT2LMHeadModel", activation_function="gelu").layers[0].ffn.act == "gelu"


def test_gpt_neox() -> None:
    bare = make_arch({"architectures": ["GPTNeoXForCausalLM"]})  # GPT-NeoX-20B's shape
    assert bare.num_params() == 20_554_567_680
    assert bare.layers[0].mixer.rope == Rope(24, 10_000.0)
    assert {layer.place for layer in bare.layers} == {"parallel"}
    assert bare.layers[0].ffn == Dense(24576, True, True, act="gelu", gated=False)

    def neox(**over: Any) -> Model:
        return tiny("GPTNeoXForCausalLM", **over)

    assert neox(hidden_act="gelu_fast").layers[0].ffn.act == "gelu_tanh"
    assert neox(use_parallel_residual=False).layers[0].place == "pre"
    assert not neox(attention_bias=False).layers[0].mixer.qkv_bias
    new = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}
    assert rope_of(neox(rope_parameters=new)) == Rope(4, 500.0)
    assert rope_of(neox(rotary_pct=1.0, rotary_emb_base=77)) == Rope(16, 77.0)


def test_sections_of_rotated_channels() -> None:
    def sections(family: str, **rope: Any) -> Any:
        found = tiny(family, rope_parameters=rope).layers[1].mixer.rope
        return found.sections, found.sections_interleaved

    name = "Qwen3_5ForCausalLM"
    assert sections(name, mrope_section=[1, 2, 1]) == ((1, 2, 1), False)
    mixed = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    assert sections(name, type="mrope", **mixed) == ((2, 1, 1), True)
    assert sections(name, mrope_interleaved=True) == (None, False)
    wrong = refusal(name, rope_parameters={"mrope_section": [2, 2, 1]})
    assert "mrope_section is [2, 2, 1], but its sum must be 4, the pairs of rotated" in wrong
    assert "mrope_section" in refusal(name, rope_parameters={"mrope_section": [4]})
    assert "'mrope' is not supported" in refusal(name, rope_parameters={"type": "mrope"})


def test_unsupported_architecture() -> None:
    assert refusal(architectures=["MambaForCausalLM"]) == (
        f"config.json: architectures is ['MambaForCausalLM']; supported are {', '.join(FAMILIES)}"
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


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_nobody_knows_are_told(family: str) -> None:
    """What is read, what changes no arithmetic and what is off is known."""
    assert make_arch(tiny_config(family)).unknown_keys == ()
    off = {"new_bias": False, "new_scale": 0, "new_layers": [], "new_norm": None}
    harmless = {"initializer_range": 0.1, "pad_token_id": 7, "vision_start_token_id": 9}
    odd = {"some_scale": 3.0, "some_kind": "other", "output_multiplier": 2.0, "fuse_norm": True}
    config = tiny_config(family)
    key = FAMILIES[family].text_key
    text = config if key is None else config[key]
    text |= odd | off | harmless
    if text is not config:
        config |= {"outer_scale": 2.0}
        odd |= {"outer_scale": 2.0}
    assert sorted(make_arch(config).unknown_keys) == sorted(odd)
    assert make_arch(config) == make_arch(tiny_config(family))


def test_every_key_of_published_configs_is_known() -> None:
    for path in (Path(__file__).parents[2] / "benchmarks/models").glob("*/config.json"):
        assert make_arch(json.loads(path.read_text())).unknown_keys == (), path
