"""Tiny configs in which no rounding makes a token choose other experts: it uses all of them.

So it is with the tokens that a token attends to.
"""

from __future__ import annotations

from typing import Any

from gllm_engine.arch.tiny import tiny_config

_ALL = {"num_experts_per_tok": 8, "moe_k": 8, "moe_topk": 8, "index_topk": 4096}


def every_expert(family: str) -> dict[str, int]:
    """What to change in the family's tiny config; {} if it has no experts."""
    config = tiny_config(family)
    config = config.get("text_config", config)
    groups = {"topk_group": config["n_group"]} if "n_group" in config else {}
    return {key: value for key, value in _ALL.items() if key in config} | groups


def usual_heads(family: str) -> dict[str, Any]:
    """What to change in the family's tiny config for heads of a size that FlashInfer has."""
    if family == "GPTBigCodeForCausalLM":
        return {"n_embd": 256}
    if family == "Phi3ForCausalLM":  # no head_dim, and RoPE factors for a part of the head
        return {"hidden_size": 256, "partial_rotary_factor": 0.125}
    config = tiny_config(family)
    text = config.get("text_config", config)
    if "kv_lora_rank" in text:  # 16 more channels are rotated
        return {"qk_nope_head_dim": 48, "v_head_dim": 64}
    rope = text.get("rope_parameters", {})
    if "mrope_section" in rope:
        head_dim = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
        times = 64 // head_dim
        sections = [size * times for size in rope["mrope_section"]]
        return {"head_dim": 64, "rope_parameters": rope | {"mrope_section": sections}}
    return {"kv_channels": 64} if family.startswith("ChatGLM") else {"head_dim": 64}
