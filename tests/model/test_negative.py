"""Every field of a spec matters: with one flipped, logits are wrong by more than 1e-3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CPU, all_logits, load, some_tokens

from gllm_engine.arch import Gqa, Layer, Model, Moe, read_arch
from gllm_engine.arch.rope import Rope
from gllm_engine.model import Decoder
from gllm_engine.model.tiny import write_tiny_model

Change = Callable[[Model], Model]


def mixer(**change: Any) -> Change:
    return lambda m: m.each(mixer=lambda _, layer: replace(layer.mixer, **change))


def ffn(**change: Any) -> Change:
    return lambda m: m.each(ffn=lambda _, layer: replace(layer.ffn, **change))


def ffn_of_experts(**change: Any) -> Change:
    def changed(_: int, layer: Layer) -> Any:
        return replace(layer.ffn, **change) if isinstance(layer.ffn, Moe) else layer.ffn

    return lambda m: m.each(ffn=changed)


def routing(**change: Any) -> Change:
    def changed(_: int, layer: Layer) -> Any:
        if not isinstance(layer.ffn, Moe):
            return layer.ffn
        return replace(layer.ffn, routing=replace(layer.ffn.routing, **change))

    return lambda m: m.each(ffn=changed)


def clamp(**change: Any) -> Change:
    def changed(_: int, layer: Layer) -> Any:
        return replace(layer.ffn, clamp=replace(layer.ffn.clamp, **change))

    return lambda m: m.each(ffn=changed)


def rope(**change: Any) -> Change:
    def changed(_: int, layer: Layer) -> Any:
        return replace(layer.mixer, rope=replace(layer.mixer.rope, **change))

    return lambda m: m.each(mixer=changed)


def scaling(**change: Any) -> Change:
    def changed(_: int, layer: Layer) -> Any:
        old = layer.mixer.rope
        return replace(layer.mixer, rope=replace(old, scaling=replace(old.scaling, **change)))

    return lambda m: m.each(mixer=changed)


def place(name: str) -> Change:
    return lambda m: m.each(place=lambda *_: name)


def model(**change: Any) -> Change:
    return lambda m: replace(m, **change)


def temperature(**change: Any) -> Change:
    def changed(_: int, layer: Layer) -> Any:
        old = layer.mixer.temperature
        return replace(layer.mixer, temperature=replace(old, **change))

    return lambda m: m.each(mixer=changed)


def gqa(**change: Any) -> Change:
    """In layers with softmax attention."""

    def changed(_: int, layer: Layer) -> Any:
        return replace(layer.mixer, **change) if isinstance(layer.mixer, Gqa) else layer.mixer

    return lambda m: m.each(mixer=changed)


def indexer(**change: Any) -> Change:
    def changed(_: int, layer: Layer) -> Any:
        return replace(layer.mixer, indexer=replace(layer.mixer.indexer, **change))

    return lambda m: m.each(mixer=changed)


def indexer_of_its_own_only(m: Model) -> Model:
    """Layers that share one attend to everything."""

    def changed(_: int, layer: Layer) -> Any:
        return replace(layer.mixer, indexer=None) if layer.needs_earlier else layer.mixer

    return m.each(mixer=changed)


def wide_rope(m: Model) -> Model:
    """In layers with softmax attention, all channels rotate."""
    rope = next(layer.mixer.rope for layer in m.layers if isinstance(layer.mixer, Gqa))
    return gqa(rope=replace(rope, dim=32))(m)


def indexer_interleaved(m: Model) -> Model:
    """Pairs of channels in the other order."""
    old = m.layers[0].mixer.indexer.rope
    return indexer(rope=replace(old, interleaved=not old.interleaved))(m)


def swapped_ropes(m: Model) -> Model:
    """Each layer has the RoPE of the layer before."""
    ropes = [layer.mixer.rope for layer in m.layers]
    return m.each(mixer=lambda i, layer: replace(layer.mixer, rope=ropes[i - 1]))


LLAMA, GLM, QWEN3 = "LlamaForCausalLM", "GlmForCausalLM", "Qwen3ForCausalLM"
GEMMA2, GEMMA3, COHERE2 = "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Cohere2ForCausalLM"
GRANITE, SMOLLM3 = "GraniteForCausalLM", "SmolLM3ForCausalLM"
HUNYUAN, MINISTRAL3 = "HunYuanDenseV1ForCausalLM", "Ministral3ForCausalLM"
GPT_OSS = "GptOssForCausalLM"
LLAMA4, MINIMAX_M2 = "Llama4ForCausalLM", "MiniMaxM2ForCausalLM"
# All layers have a temperature, so that a changed one is one of all.
ALL_TEMPERED = {"no_rope_layers": [0, 0]}
OLMO2, STARCODER2 = "Olmo2ForCausalLM", "Starcoder2ForCausalLM"
BIASED = {"attention_bias": True, "mlp_bias": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
QWEN2_MOE, QWEN3_MOE = "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"
QWEN3_NEXT, QWEN3_5 = "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"
QWEN3_5_MOE = "Qwen3_5MoeForCausalLM"
GLM4_MOE, ERNIE_MOE = "Glm4MoeForCausalLM", "Ernie4_5_MoeForCausalLM"
SHARING = {"indexer_types": ["full", "shared"]}
V32, GLM_DSA = "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"
DEEPSEEK_V2, DEEPSEEK_V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
KIMI, NEOX = "KimiK2ForCausalLM", "GPTNeoXForCausalLM"
SPARSE = {"decoder_sparse_step": 1}
ALL_SPARSE = {"first_k_dense_replace": 0}
WIDE = {"head_dim": 32}  # enough pairs of channels for YaRN's ramp to start and end within
MSCALE = YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}

CASES: dict[str, tuple[str, dict[str, Any], Change]] = {
    "qk_norm": (QWEN3, {}, mixer(qk_norm=None)),
    "qkv_bias": (LLAMA, BIASED, mixer(qkv_bias=False)),
    "qkv_bias qwen2": ("Qwen2ForCausalLM", {}, mixer(qkv_bias=False)),
    "out_bias": (LLAMA, BIASED, mixer(out_bias=False)),
    "mlp bias": (LLAMA, BIASED, ffn(bias=False)),
    "eps": (LLAMA, {}, lambda m: replace(m, eps=m.eps * 1000)),
    "theta": (LLAMA, {}, rope(theta=20_000.0)),
    "rope_ratio": ("ChatGLMModel", {}, rope(theta=10_000.0)),
    "interleaved": (GLM, {}, rope(interleaved=False)),
    "partial": (GLM, {}, rope(dim=16)),
    "linear": (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}}, rope(scaling=None)),
    "linear factor": (
        LLAMA,
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        scaling(factor=5.0),
    ),
    "dynamic": (
        LLAMA,
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32},
        rope(scaling=None),
    ),
    "dynamic length": (
        LLAMA,
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32},
        scaling(original_len=16),
    ),
    "llama3": (LLAMA, {"rope_scaling": LLAMA3}, rope(scaling=None)),
    "llama3 low": (LLAMA, {"rope_scaling": LLAMA3}, scaling(low_freq_factor=2.0)),
    "llama3 high": (LLAMA, {"rope_scaling": LLAMA3}, scaling(high_freq_factor=2.0)),
    "llama3 length": (LLAMA, {"rope_scaling": LLAMA3}, scaling(original_len=64)),
    "yarn": (LLAMA, WIDE | {"rope_scaling": YARN}, rope(scaling=None)),
    "yarn attention": (LLAMA, WIDE | {"rope_scaling": YARN}, scaling(attention_factor=1.0)),
    "yarn mscale": (LLAMA, WIDE | {"rope_scaling": MSCALE}, scaling(mscale=0.5)),
    "yarn beta_fast": (LLAMA, WIDE | {"rope_scaling": YARN}, scaling(beta_fast=4.0)),
    "yarn beta_slow": (LLAMA, WIDE | {"rope_scaling": YARN}, scaling(beta_slow=0.1)),
    "yarn truncate": (LLAMA, WIDE | {"rope_scaling": YARN}, scaling(truncate=False)),
    "window": ("MistralForCausalLM", {}, mixer(window=None)),
    "window by one": ("MistralForCausalLM", {}, mixer(window=47)),
    "renorm": (QWEN3_MOE, {}, routing(renorm=False)),
    "renorm mixtral": ("MixtralForCausalLM", {}, routing(renorm=False)),
    "no renorm": (QWEN2_MOE, SPARSE, routing(renorm=True)),
    "top_k": (QWEN3_MOE, {}, routing(top_k=3)),
    "scoring": (GLM4_MOE, ALL_SPARSE, routing(scoring="softmax")),
    "selection bias": (GLM4_MOE, ALL_SPARSE, routing(biased=False)),
    "groups": (GLM4_MOE, ALL_SPARSE, routing(groups=1, kept_groups=1)),
    "kept groups": (GLM4_MOE, ALL_SPARSE, routing(kept_groups=3)),
    "glm renorm": (GLM4_MOE, ALL_SPARSE, routing(renorm=False)),
    "scale": (GLM4_MOE, ALL_SPARSE, routing(scale=1.0)),
    "sum_eps": (GLM4_MOE, ALL_SPARSE, routing(sum_eps=1.0)),
    "least_sum": (ERNIE_MOE, {"moe_norm_min": 0.9}, routing(least_sum=1e-12)),
    "ernie bias": (ERNIE_MOE, {}, routing(biased=False)),
    "ernie renorm": (ERNIE_MOE, {}, routing(renorm=False)),
    "plain shared": (ERNIE_MOE, {}, ffn_of_experts(shared=0)),
    "local_experts": (QWEN3_MOE, {}, ffn(local_experts=(0, 7))),
    "shared": (QWEN2_MOE, SPARSE, ffn(shared=0, shared_gate=False)),
    "shared gate": (QWEN2_MOE, SPARSE, ffn(shared_gate=False)),
    "latent_eps": (DEEPSEEK_V3, {}, mixer(latent_eps=1e-2)),
    "scale latent": (KIMI, {}, mixer(scale=32**-0.5)),
    "interleaved latent": (DEEPSEEK_V2, {}, rope(interleaved=False)),
    "groups v2": (DEEPSEEK_V2, ALL_SPARSE, routing(groups=1, kept_groups=1)),
    "kept groups v2": (DEEPSEEK_V2, ALL_SPARSE, routing(kept_groups=3)),
    "scale v2": (DEEPSEEK_V2, ALL_SPARSE, routing(scale=1.0)),
    "no renorm v2": (DEEPSEEK_V2, ALL_SPARSE, routing(renorm=True)),
    "scoring v2": (DEEPSEEK_V2, ALL_SPARSE, routing(scoring="sigmoid")),
    "scoring v3": (DEEPSEEK_V3, ALL_SPARSE, routing(scoring="softmax")),
    "kimi's yarn": (KIMI, {}, rope(scaling=None)),
    "kimi's ramp": (KIMI, {}, scaling(beta_fast=32.0)),
    "sandwich": ("Glm4ForCausalLM", {}, place("pre")),
    "qk_norm after": (QWEN3, {}, mixer(qk_norm="head_after")),
    "qk_norm before": (HUNYUAN, {}, mixer(qk_norm="head")),
    "alpha": (HUNYUAN, {}, rope(theta=10_000.0)),
    "no rope": (SMOLLM3, {}, swapped_ropes),
    "rope per layer": (GEMMA3, {}, swapped_ropes),
    "window of one layer": ("Olmo3ForCausalLM", {}, mixer(window=None)),
    "scale granite": (GRANITE, {}, mixer(scale=None)),
    "embed_scale": (GRANITE, {}, model(embed_scale=1.0)),
    "residual_scale": (GRANITE, {}, model(residual_scale=1.0)),
    "logit_scale": (GRANITE, {}, model(logit_scale=1.0)),
    "scale gemma": (GEMMA2, {}, mixer(scale=None)),
    "softcap": (GEMMA2, {}, mixer(softcap=None)),
    "softcap's size": (GEMMA2, {}, mixer(softcap=2.5)),
    "logit_softcap": (GEMMA2, {}, model(logit_softcap=None)),
    "plus one": (GEMMA2, {}, model(norm="rms")),
    "gelu_tanh": (GEMMA2, {}, ffn(act="silu")),
    "layer norm": (COHERE2, {}, model(norm="rms")),
    "interleaved cohere": (COHERE2, {}, swapped_ropes),
    "norm bias": (STARCODER2, {}, model(norm="layer_without_bias")),
    "gelu of starcoder": (STARCODER2, {}, ffn(act="silu")),
    "erf gelu": (STARCODER2, {}, ffn(act="gelu")),
    "gelu of gpt2": ("GPT2LMHeadModel", {}, ffn(act="gelu")),
    "positions of gpt2": ("GPT2LMHeadModel", {}, model(positions=0)),
    "parallel": (NEOX, {}, place("pre")),
    "partial neox": (NEOX, {}, rope(dim=16)),
    "theta of neox": (NEOX, {}, rope(theta=20_000.0)),
    "gelu of neox": (NEOX, {}, ffn(act="gelu_tanh")),
    "positions": ("GPTBigCodeForCausalLM", {}, model(positions=0)),
    "temperature": (MINISTRAL3, {}, mixer(temperature=None)),
    "temperature's beta": (MINISTRAL3, {}, temperature(beta=0.2)),
    "temperature's length": (MINISTRAL3, {}, temperature(length=31)),
    "longrope": ("Phi3ForCausalLM", {}, rope(scaling=None)),
    "longrope length": ("Phi3ForCausalLM", {}, scaling(original_len=4096)),
    "longrope attention": ("Phi3ForCausalLM", {}, scaling(attention_factor=1.0)),
    "output gate": (QWEN3_NEXT, {}, gqa(output_gate=False)),
    "qk_norm of a hybrid": (QWEN3_NEXT, {}, gqa(qk_norm=None)),
    "partial rotary of a hybrid": (QWEN3_NEXT, {}, wide_rope),
    "plus one of a hybrid": (QWEN3_5, {}, model(norm="rms")),
    "shared gate of a hybrid": (QWEN3_NEXT, {}, ffn(shared_gate=False)),
    "renorm of a hybrid": (QWEN3_5_MOE, {}, routing(renorm=False)),
    "indexer": (V32, {}, mixer(indexer=None)),
    "an earlier layer's choice": (GLM_DSA, SHARING, indexer_of_its_own_only),
    "indexer's top_k": (V32, {}, indexer(top_k=13)),
    "indexer's rope": (V32, {}, indexer_interleaved),
    "indexer's rope, GLM": (GLM_DSA, {}, indexer_interleaved),
    "indexer's theta": (GLM_DSA, {}, indexer(rope=Rope(16, 20_000.0, True))),
    "indexer's eps": (V32, {}, indexer(eps=10.0)),
    "sinks": (GPT_OSS, {}, mixer(sinks=False)),
    "window of gpt-oss": (GPT_OSS, {}, mixer(window=None)),
    "limit of a clamp": (GPT_OSS, {}, clamp(limit=2.5)),
    "slope of a clamp": (GPT_OSS, {}, clamp(slope=1.702)),
    "clamp": (GPT_OSS, {}, ffn(clamp=None)),
    "bias of a router": (GPT_OSS, {}, ffn(router_bias=False)),
    "biases of experts": (GPT_OSS, {}, ffn(bias=False)),
    "biases of experts' outputs": (GPT_OSS, {}, ffn(out_bias=False)),
    "chunks": (LLAMA4, {}, mixer(chunked=False)),
    "size of a chunk": (LLAMA4, {}, mixer(window=47)),
    "norm of unit heads": (LLAMA4, {}, mixer(qk_norm=None)),
    "offset of a temperature": (LLAMA4, ALL_TEMPERED, temperature(offset=0)),
    "weights on the input": (LLAMA4, {}, ffn_of_experts(on_input=False)),
    "sigmoid of llama4": (LLAMA4, {}, routing(scoring="softmax")),
    "shared expert of llama4": (LLAMA4, {}, ffn_of_experts(shared=0)),
    "whole norm": (MINIMAX_M2, {}, mixer(qk_norm=None)),
    "partial rotary of minimax": (MINIMAX_M2, {}, rope(dim=16)),
    "bias of minimax": (MINIMAX_M2, {}, routing(biased=False)),
    "renorm of minimax": (MINIMAX_M2, {}, routing(renorm=False)),
    "partial rotary": ("Phi3ForCausalLM", {"rope_scaling": None}, rope(dim=16)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_changed_spec_gives_other_logits(tmp_path: Path, name: str) -> None:
    family, over, change = CASES[name]
    write_tiny_model(tmp_path, family, **over)
    right = load(tmp_path)
    wrong_arch = change(right.arch)
    assert wrong_arch != right.arch
    length = right.arch.max_len
    wrong = Decoder(wrong_arch, dtype=torch.float32, device=CPU, max_model_len=length)
    source = right.weights()
    for weight, view in wrong.weights().items():
        view.copy_(source[weight])
    tokens = some_tokens(90)
    assert (all_logits(right, tokens) - all_logits(wrong, tokens)).abs().max() > 1e-3


def test_tie_matters(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "untied", LLAMA)
    write_tiny_model(tmp_path / "tied", LLAMA, tie_word_embeddings=True)
    assert "lm_head.weight" in read_arch(tmp_path / "untied").weights()
    assert "lm_head.weight" not in read_arch(tmp_path / "tied").weights()
    untied, tied = load(tmp_path / "untied"), load(tmp_path / "tied")
    source = untied.weights()
    for weight, view in tied.weights().items():
        view.copy_(source[weight])
    tokens = some_tokens(20)
    assert (all_logits(untied, tokens) - all_logits(tied, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("Glm4ForCausalLM", {}),
        (QWEN2_MOE, SPARSE),
        (GLM4_MOE, ALL_SPARSE | {"num_experts_per_tok": 4}),  # so that all experts are chosen
        (DEEPSEEK_V2, ALL_SPARSE | {"topk_group": 4, "num_experts_per_tok": 4}),
        (KIMI, ALL_SPARSE | {"num_experts_per_tok": 4}),
        (ERNIE_MOE, {"moe_layer_start_index": 0, "moe_k": 5}),
        (OLMO2, {}),
        (V32, ALL_SPARSE | {"num_experts_per_tok": 4}),
        (MINIMAX_M2, {"num_experts_per_tok": 7}),
        (LLAMA4, {"no_rope_layers": [1], "interleave_moe_layer_step": 1, "num_experts_per_tok": 7}),
        (GPT_OSS, {"num_experts_per_tok": 7, "layer_types": ["full_attention"]}),
        ("Starcoder2ForCausalLM", {}),
        (NEOX, {}),
        (HUNYUAN, {}),
        ("HunYuanMoEV1ForCausalLM", {"moe_topk": 7}),
        ("Ernie4_5ForCausalLM", {}),
        (GEMMA3, {"layer_types": ["full_attention"]}),
        # Without RoPE, a bias of the keys would add the same to all scores of a query.
        (COHERE2, {"layer_types": ["sliding_attention"], "attention_bias": True}),
    ],
)
def test_every_weight_matters(tmp_path: Path, family: str, over: dict[str, Any]) -> None:
    """Zeroing any one weight changes the logits: none is loaded and then forgotten."""
    write_tiny_model(tmp_path, family, num_hidden_layers=1, **over)
    decoder, tokens = load(tmp_path), some_tokens(30)
    right = all_logits(decoder, tokens)
    for name, view in decoder.weights().items():
        saved = view.clone()
        view.zero_()
        changed = (all_logits(decoder, tokens) - right).abs().max()
        assert changed > 1e-3, name
        view.copy_(saved)
    torch.testing.assert_close(all_logits(decoder, tokens), right)
