"""OLMo 2 and 3: norms after each half of a layer, and of all heads' queries and keys together."""

from __future__ import annotations

from dataclasses import replace

from gllm_engine.arch.checkpoint import Names
from gllm_engine.arch.families.common import read_head_dim, with_layer_types, with_mixers
from gllm_engine.arch.families.llama import LLAMA, llama
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model
from gllm_engine.arch.rope import read_layer_ropes

OLMO2 = LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5, "eos_token_id": 50279}
_NAMES = Names(
    renames=(
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    )
)


def olmo2(c: Fields) -> Model:
    return _olmo(llama(c))


OLMO3 = OLMO2 | {"rope_theta": 500_000.0, "sliding_window": 4096}


def olmo3(c: Fields) -> Model:
    c.require(rope_theta=500_000.0)  # transformers gives it to layers with full attention only
    full, sliding = read_layer_ropes(c, read_head_dim(c))
    model = _olmo(llama(c, full))
    return with_layer_types(c, model, full_every=4, full=full, sliding=sliding)


def _olmo(model: Model) -> Model:
    model = with_mixers(model, qk_norm="whole")
    return replace(model.each(place=lambda *_: "post"), names=_NAMES)
