"""The supported architectures: for each name in config.json, how its family is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gllm_engine.arch.families import (
    cohere,
    deepseek,
    ernie,
    gemma,
    glm,
    gpt,
    gpt_oss,
    granite,
    hunyuan,
    llama,
    llama4,
    minimax,
    mistral,
    olmo,
    phi,
    qwen,
    qwen_hybrid,
    qwen_vl,
    smollm,
    towers,
)
from gllm_engine.arch.families.common import beside_images
from gllm_engine.arch.fields import Fields
from gllm_engine.arch.model import Model
from gllm_engine.arch.vision import Vision


class Family(NamedTuple):
    """`defaults`: for keys that a config may omit. `text_key`: the key of the object that describes
    the text model, beside other models; None: the config itself does. `others`: in place of this
    family, for other values of model_type in that object. `vision`: reads the tower, if the config
    has one, from its object, the config and the text model. `may_be_flat`: without an object for
    the text model, the config itself describes it.
    """

    read: Callable[[Fields], Model]
    defaults: dict[str, Any]
    text_key: str | None = None
    others: Mapping[str, Family] = MappingProxyType({})
    vision: Callable[[Fields, Fields, Model], Vision] | None = None
    may_be_flat: bool = False

    def of(self, config: dict[str, Any]) -> Family:
        """The family that describes the text model of a config."""
        text = config.get(self.text_key or "")
        kind = text.get("model_type") if isinstance(text, dict) else None
        return self.others.get(kind, self) if isinstance(kind, str) else self


_KIMI_K25 = Family(
    beside_images(deepseek.deepseek_v3), deepseek.DEEPSEEK_V3, "text_config", vision=towers.kimi
)
# The order is that of choice, if a config names several, and of messages.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(llama.llama, llama.LLAMA),
    "MistralForCausalLM": Family(mistral.mistral, mistral.MISTRAL),
    "Qwen2ForCausalLM": Family(qwen.qwen2, qwen.QWEN2),
    "Qwen3ForCausalLM": Family(qwen.qwen3, qwen.QWEN3),
    "MixtralForCausalLM": Family(mistral.mixtral, mistral.MIXTRAL),
    "Qwen2MoeForCausalLM": Family(qwen.qwen2_moe, qwen.QWEN2_MOE),
    "Qwen3MoeForCausalLM": Family(qwen.qwen3_moe, qwen.QWEN3_MOE),
    "Qwen3NextForCausalLM": Family(qwen_hybrid.qwen3_next, qwen_hybrid.QWEN3_NEXT),
    "Qwen3_5ForCausalLM": Family(qwen_hybrid.qwen3_5, qwen_hybrid.QWEN3_5),
    "Qwen3_5ForConditionalGeneration": Family(
        qwen_hybrid.qwen3_5,
        qwen_hybrid.QWEN3_5,
        "text_config",
        vision=qwen_vl.qwen3_5_vision,
    ),
    "Qwen3_5MoeForCausalLM": Family(qwen_hybrid.qwen3_5_moe, qwen_hybrid.QWEN3_5_MOE),
    "Qwen3_5MoeForConditionalGeneration": Family(
        qwen_hybrid.qwen3_5_moe,
        qwen_hybrid.QWEN3_5_MOE,
        "text_config",
        vision=qwen_vl.qwen3_5_vision,
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        qwen_vl.qwen2_5_vl,
        qwen_vl.QWEN2_5_VL,
        "text_config",
        vision=qwen_vl.qwen2_5_vision,
        may_be_flat=True,
    ),
    "Qwen3VLForConditionalGeneration": Family(
        qwen_vl.qwen3_vl, qwen_vl.QWEN3_VL, "text_config", vision=qwen_vl.qwen3_vl_vision
    ),
    "Qwen3VLMoeForConditionalGeneration": Family(
        qwen_vl.qwen3_vl_moe, qwen_vl.QWEN3_VL_MOE, "text_config", vision=qwen_vl.qwen3_vl_vision
    ),
    "GlmForCausalLM": Family(glm.glm, glm.GLM),
    "Glm4ForCausalLM": Family(glm.glm4, glm.GLM),
    "Olmo2ForCausalLM": Family(olmo.olmo2, olmo.OLMO2),
    "Olmo3ForCausalLM": Family(olmo.olmo3, olmo.OLMO3),
    "SmolLM3ForCausalLM": Family(smollm.smollm3, smollm.SMOLLM3),
    "GraniteForCausalLM": Family(granite.granite, granite.GRANITE),
    "GraniteMoeForCausalLM": Family(granite.granite_moe, granite.GRANITE_MOE),
    "GraniteMoeHybridForCausalLM": Family(granite.granite_hybrid, granite.GRANITE_HYBRID),
    "HunYuanDenseV1ForCausalLM": Family(hunyuan.hunyuan, hunyuan.HUNYUAN),
    "HunYuanMoEV1ForCausalLM": Family(hunyuan.hunyuan_moe, hunyuan.HUNYUAN_MOE),
    "Ernie4_5ForCausalLM": Family(ernie.ernie, ernie.ERNIE),
    "Ernie4_5_ForCausalLM": Family(ernie.ernie, ernie.ERNIE),  # an older name of the same
    "Phi3ForCausalLM": Family(phi.phi3, phi.PHI3),
    "Ministral3ForCausalLM": Family(mistral.ministral3, mistral.MINISTRAL3),
    # Mistral Small 3.1 and 3.2; Ministral 3 and Devstral Small 2.
    "Mistral3ForConditionalGeneration": Family(
        beside_images(mistral.mistral),
        mistral.MISTRAL,
        "text_config",
        {
            "ministral3": Family(
                beside_images(mistral.ministral3),
                mistral.MINISTRAL3,
                "text_config",
                vision=towers.pixtral,
            )
        },
        towers.pixtral,
    ),
    # LLaVA 1.5; Pixtral 12B.
    "LlavaForConditionalGeneration": Family(
        beside_images(llama.llama),
        llama.LLAMA,
        "text_config",
        {
            "mistral": Family(
                beside_images(mistral.mistral), mistral.MISTRAL, "text_config", vision=towers.llava
            )
        },
        towers.llava,
    ),
    "Gemma2ForCausalLM": Family(gemma.gemma2, gemma.GEMMA2),
    "Gemma3ForCausalLM": Family(gemma.gemma3, gemma.GEMMA3),
    "Gemma3ForConditionalGeneration": Family(
        gemma.gemma3_beside_images, gemma.GEMMA3, "text_config"
    ),
    "Cohere2ForCausalLM": Family(cohere.cohere2, cohere.COHERE2),
    "Starcoder2ForCausalLM": Family(gpt.starcoder2, gpt.STARCODER2),
    "GPT2LMHeadModel": Family(gpt.gpt2, gpt.GPT2),
    "GPTBigCodeForCausalLM": Family(gpt.gpt_bigcode, gpt.GPT_BIGCODE),
    "GPTNeoXForCausalLM": Family(gpt.gpt_neox, gpt.GPT_NEOX),
    "Glm4MoeForCausalLM": Family(glm.glm4_moe, glm.GLM4_MOE),
    "Ernie4_5_MoeForCausalLM": Family(ernie.ernie_moe, ernie.ERNIE_MOE),
    "GptOssForCausalLM": Family(gpt_oss.gpt_oss, gpt_oss.GPT_OSS),
    "Llama4ForCausalLM": Family(llama4.llama4, llama4.LLAMA4),
    "Llama4ForConditionalGeneration": Family(llama4.llama4_vision, llama4.LLAMA4, "text_config"),
    "MiniMaxM2ForCausalLM": Family(minimax.minimax_m2, minimax.MINIMAX_M2),
    "ChatGLMModel": Family(glm.chatglm, glm.CHATGLM),
    "ChatGLMForConditionalGeneration": Family(glm.chatglm, glm.CHATGLM),
    "DeepseekV3ForCausalLM": Family(deepseek.deepseek_v3, deepseek.DEEPSEEK_V3),
    "KimiK2ForCausalLM": Family(deepseek.deepseek_v3, deepseek.DEEPSEEK_V3),
    # Kimi K2.5 and K2.6. The first name is that of the published configs.
    "KimiK25ForConditionalGeneration": _KIMI_K25,
    "Kimi_K25ForConditionalGeneration": _KIMI_K25,
    "DeepseekV2ForCausalLM": Family(deepseek.deepseek_v2, deepseek.DEEPSEEK_V2),
    "Glm4MoeLiteForCausalLM": Family(deepseek.deepseek_v3, glm.GLM4_MOE_LITE),
    "DeepseekV32ForCausalLM": Family(deepseek.deepseek_v32, deepseek.DEEPSEEK_V32),
    "GlmMoeDsaForCausalLM": Family(deepseek.deepseek_v32, glm.GLM_MOE_DSA),
}
