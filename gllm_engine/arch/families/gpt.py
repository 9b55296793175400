"""GPT-2 and what resembles it: GPT-NeoX, StarCoder and StarCoder2.

These have layer norms with biases, and feed-forward layers without a gate.
"""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Layout, Names, Renames, Variant
from gllm_engine.arch.families.common import (
    ACTIVATIONS,
    divided_head_dim,
    read_decoder,
    read_gqa,
    with_window,
)
from gllm_engine.arch.families.llama import LLAMA
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Dense, Gqa, Model
from gllm_engine.arch.rope import read_rope

_GELUS = tuple(name for name, act in ACTIVATIONS.items() if act != "silu")
_MASK = r"\.(bias|masked_bias)$"

GPT2 = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
}
_GPT2_RENAMES: Renames = (
    ("model.embed_tokens", "transformer.wte"),
    ("model.embed_positions", "transformer.wpe"),
    ("model.layers.", "transformer.h."),
    ("model.norm", "transformer.ln_f"),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
    ("self_attn.q_proj", "attn.c_attn"),
    ("self_attn.k_proj", "attn.c_attn"),
    ("self_attn.v_proj", "attn.c_attn"),
    ("self_attn.o_proj", "attn.c_proj"),
    ("mlp.up_proj", "mlp.c_fc"),
    ("mlp.down_proj", "mlp.c_proj"),
)
_GPT2_NAMES = Names(
    renames=_GPT2_RENAMES,
    variants=(Variant(r"^(wte|wpe|h|ln_f)\.", (("transformer.", ""),)),),
    layouts=((r"\.(attn|mlp)\.c_\w+\.weight$", Layout(transposed=True)),),
    unused=rf"h\.\d+\.attn{_MASK}",
)


def gpt2(c: Fields) -> Model:
    c.require(scale_attn_by_inverse_layer_idx=False)
    return replace(_gpt2(c, kv_heads=c.count("n_head")), names=_GPT2_NAMES)


# StarCoder and SantaCoder: GPT-2 with one key/value head.
GPT_BIGCODE = GPT2 | {"activation_function": "gelu_pytorch_tanh"}
_GPT_BIGCODE_NAMES = Names(renames=_GPT2_RENAMES, unused=rf"h\.\d+\.attn{_MASK}")


def gpt_bigcode(c: Fields) -> Model:
    c.require(multi_query=True, num_key_value_heads=1)
    c.ignore("pad_key_length", "validate_runner_input", "inference_runner")
    return replace(_gpt2(c, kv_heads=1), names=_GPT_BIGCODE_NAMES)


def _gpt2(c: Fields, kv_heads: int) -> Model:
    c.require(scale_attn_weights=True, add_cross_attention=False)
    c.require(num_attention_heads=c.count("n_head"))  # transformers' name of the same
    mixer = Gqa(
        heads=c.count("n_head"),
        kv_heads=kv_heads,
        head_dim=divided_head_dim(c, "n_embd", "n_head"),
        rope=None,
        qkv_bias=True,
        out_bias=True,
    )
    ffn = _ungated(c, c.count("n_inner", 4 * c.count("n_embd")), act_key="activation_function")
    model = read_decoder(
        c,
        mixer,
        ffn,
        "layer_norm_epsilon",
        dim_key="n_embd",
        layers_key="n_layer",
        len_key="n_positions",
    )
    return replace(model, norm="layer", positions=model.max_len)


# GPT-NeoX and Pythia.
GPT_NEOX = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000.0,
    "attention_bias": True,
    "eos_token_id": 2,
}
_GPT_NEOX_NAMES = Names(
    renames=(
        ("model.embed_tokens", "gpt_neox.embed_in"),
        ("model.layers.", "gpt_neox.layers."),
        ("model.norm", "gpt_neox.final_layer_norm"),
        ("lm_head", "embed_out"),
        ("self_attn.q_proj", "attention.query_key_value"),
        ("self_attn.k_proj", "attention.query_key_value"),
        ("self_attn.v_proj", "attention.query_key_value"),
        ("self_attn.o_proj", "attention.dense"),
        ("mlp.up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ),
    layouts=((r"attention\.query_key_value\.", Layout(by_head=True)),),
    unused=rf"layers\.\d+\.attention{_MASK}",
)


def gpt_neox(c: Fields) -> Model:
    heads = c.count("num_attention_heads")
    head_dim = divided_head_dim(c, "hidden_size", "num_attention_heads")
    share = c.real("rotary_pct")
    rope = read_rope(c, head_dim, theta=c.real("rotary_emb_base"), rotated_share=share)
    bias = c.flag("attention_bias")
    mixer = Gqa(heads, heads, head_dim, rope, qkv_bias=bias, out_bias=bias)
    ffn = _ungated(c, c.count("intermediate_size"))
    model = read_decoder(c, mixer, ffn, eps_key="layer_norm_eps")
    if c.flag("use_parallel_residual", True):
        model = model.each(place=lambda *_: "parallel")
    return replace(model, norm="layer", names=_GPT_NEOX_NAMES)


STARCODER2 = LLAMA | {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
}
_STARCODER2_NAMES = Names(renames=(("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")))


def starcoder2(c: Fields) -> Model:
    c.require(norm_type="layer_norm", mlp_type="default", scale_attn_weights=True)
    c.ignore("activation_function", "layer_norm_epsilon")  # hidden_act and norm_epsilon count
    bias = c.flag("use_bias")
    ffn = Dense(c.count("intermediate_size"), bias, bias, act="gelu_tanh", gated=False)
    model = read_decoder(c, read_gqa(c, bias_key="use_bias"), ffn, eps_key="norm_epsilon")
    return replace(with_window(c, model), norm="layer", names=_STARCODER2_NAMES)


def _ungated(c: Fields, hidden: int, act_key: str = "hidden_act") -> Dense:
    act = ACTIVATIONS[c.choice(act_key, _GELUS)]
    return Dense(hidden, bias=True, out_bias=True, act=act, gated=False)
