"""Layers whose mixer and ffn read the same stream, through a norm each: GPT-NeoX's arithmetic."""

from __future__ import annotations

import torch
import transformers
from tiny_models import CPU, all_logits, some_tokens
from torch import Tensor

from gllm_engine.arch import Dense, Gqa, Layer, Model, Rope
from gllm_engine.model import Decoder

HEADS, DIM, HIDDEN = 4, 64, 96


def neox_model() -> Model:
    mixer = Gqa(HEADS, HEADS, DIM // HEADS, Rope(8, 10_000.0), qkv_bias=True, out_bias=True)
    ffn = Dense(HIDDEN, bias=True, out_bias=True, act="gelu", gated=False)
    layers = (Layer(mixer, ffn, "parallel"),) * 2
    return Model(DIM, 384, layers, 1e-5, tie=False, max_len=128, norm="layer")


def to_neox(name: str) -> str:
    names = {
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.norm": "gpt_neox.final_layer_norm",
        "model.layers": "gpt_neox.layers",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def test_logits_agree_with_gpt_neox() -> None:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=384,
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3)
    state = theirs.state_dict()
    decoder = Decoder(neox_model(), dtype=torch.float32, device=CPU, max_model_len=128)
    for name, view in decoder.weights().items():
        view.copy_(stored(state, name))
    tokens = some_tokens(60)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(all_logits(decoder, tokens), expected, rtol=0, atol=2e-5)


def stored(state: dict[str, Tensor], name: str) -> Tensor:
    """Our weight `name`, of GPT-NeoX's. Its rows of q, k and v alternate by head."""
    for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
        if part in name:
            fused = state[to_neox(name).replace(f"self_attn.{part}", "attention.query_key_value")]
            return fused.unflatten(0, (HEADS, 3, -1))[:, i].flatten(0, 1)
    return state[to_neox(name)]
