"""However many ranks compute a text, and whatever else goes on, it is one rank's text.

Real processes on the CPU, forked from one that has imported torch; those of test_loss.py,
test_nodes.py and test_recorded_ranks.py start as a user's do. Each group of workers is asked
everything. A pipeline computes the very same numbers as one rank; ranks that share layers sum in
another order, so there what is drawn at random is not compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from moving import restless_layers, serve_until_moved

from gllm_engine import LLM, RequestOutput, SamplingParams, StructuredOutputs, write_tiny_model
from gllm_engine.arch import read_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.text.constraints import Constraint

pytestmark = pytest.mark.usefixtures("quick_starts")

SMALL = {"device": "cpu", "cpu_threads": 1, "max_model_len": 512, "max_num_seqs": 16}
# Little enough for preemption, and chunks of prompts.
TIGHT = SMALL | {"num_pages": 104, "page_size": 2, "max_num_batched_tokens": 24}
BEGINNING = "the quick brown fox jumps over the lazy dog, " * 4
PROMPTS = [
    BEGINNING + ending
    for ending in ("and the cat sleeps", "世界 and more", "!", "which is a longer ending of it all")
]
FORM = r"[a-f]{3}(yes|no)"
BASE = {"max_tokens": 16, "ignore_eos": True}
GREEDY = SamplingParams(temperature=0, **BASE)
PENALIZED = SamplingParams(
    temperature=0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, **BASE
)
SCORED = SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, **BASE)
STRICT = SamplingParams(
    temperature=0, max_tokens=60, structured_outputs=StructuredOutputs(regex=FORM)
)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=60, min_p=0.01, seed=7, **BASE)
PLAIN = SamplingParams(temperature=1.0, seed=3, **BASE)
FIRM = [GREEDY, PENALIZED, SCORED, STRICT]
DRAWN = [SEEDED, PLAIN, SamplingParams(seed=11, repetition_penalty=1.3, **BASE)]

WAYS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2, "plans_in_flight": 2},
    "tp2, throttled": {"tensor_parallel_size": 2, "schedule_policy": "token_throttling"},
    "pp2": {"pipeline_parallel_size": 2, "min_prefill_tokens": 4},
    "pp3, uneven": {
        "pipeline_parallel_size": 3,
        "assigned_layers": "1,3,1",
        "schedule_policy": "chunked_prefill",
    },
    "pp2, in phases": {
        "pipeline_parallel_size": 2,
        "schedule_policy": "prefill_then_decode",
        "min_prefill_tokens": 4,
    },
    "pp2, layers move": {
        "pipeline_parallel_size": 2,
        "min_prefill_tokens": 4,
        "spare_layers": 1,
    },
    "tp2 x pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "tp2 x pp2, layers move": {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "spare_layers": 1,
    },
    "pp3, layers move": {
        "pipeline_parallel_size": 3,
        "assigned_layers": "2,2,1",
        "spare_layers": 1,
    },
    "tp4": {"tensor_parallel_size": 4},  # of 2 key/value heads
    "ep2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "ep2 x pp2": {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "pipeline_parallel_size": 2,
    },
}
LAYERS = {"num_hidden_layers": 5}
# 2 ranks have 200 and 189 tokens; 4 ranks have 104, 104, 104 and 77.
VOCAB = {"vocab_size": 389}
# Layers of both kinds on some stages, and of one kind on others.
WINDOWS = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2} | LAYERS
HYBRID = LAYERS | {
    "layer_types": [
        *("linear_attention", "full_attention", "linear_attention"),
        *("linear_attention", "full_attention"),
    ]
}
SHARED_CHOICE = LAYERS | {"indexer_types": ["full", "full", "shared", "full", "shared"]}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32]}
# Ranks' shares begin and end inside these.
CUT_BLOCKS = {"quant_method": "fp8", "weight_block_size": [24, 40]}
# Of 5 groups, 4 ranks have 2, 1, 1 and 1.
GROUPS = {"quantization_config": {"quant_method": "mxfp4"}, "intermediate_size": 160}
# Family, what is different in its config, and how it is shared out.
FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen2ForCausalLM", VOCAB, "tp2 x pp2"),  # tied: both ends of the pipeline have the embedding
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True} | VOCAB, "tp4"),
    ("Glm4ForCausalLM", {}, "tp2"),
    ("Qwen3ForCausalLM", {"quantization_config": CUT_BLOCKS}, "tp2 x pp2"),
    ("Qwen3MoeForCausalLM", {"quantization_config": BLOCKS}, "ep2"),
    ("Qwen3MoeForCausalLM", {"quantization_config": BLOCKS}, "tp2"),
    ("MistralForCausalLM", {"sliding_window": 20}, "tp2 x pp2"),
    ("Qwen2ForCausalLM", WINDOWS, "pp3, uneven"),
    ("ChatGLMModel", {"add_bias_linear": True}, "tp2, throttled"),
    # The norm of all query and key heads is of numbers on all ranks; two ranks share a K/V head.
    ("Olmo3ForCausalLM", {"sliding_window": 20}, "tp4"),
    ("Gemma2ForCausalLM", {"sliding_window": 20}, "tp2 x pp2"),
    ("Cohere2ForCausalLM", {"sliding_window": 20, "attention_bias": True}, "tp2"),
    ("GraniteForCausalLM", {}, "pp2"),
    ("GPTNeoXForCausalLM", {}, "tp2"),
    ("GPT2LMHeadModel", {"n_layer": 5}, "pp3, layers move"),
    ("GPT2LMHeadModel", {"tie_word_embeddings": True}, "tp2 x pp2"),
    ("Qwen3MoeForCausalLM", {}, "tp2"),
    ("MixtralForCausalLM", {}, "ep2"),
    ("DeepseekV3ForCausalLM", {}, "tp2 x pp2"),
    ("DeepseekV32ForCausalLM", {}, "ep2"),
    ("DeepseekV32ForCausalLM", LAYERS, "tp2 x pp2, layers move"),
    # Stages of three layers and two, because the third uses the choice of the second.
    ("GlmMoeDsaForCausalLM", SHARED_CHOICE, "tp2 x pp2"),
    ("GlmMoeDsaForCausalLM", SHARED_CHOICE, "pp2, layers move"),
    ("DeepseekV2ForCausalLM", {"q_lora_rank": None}, "ep2 x pp2"),
    ("KimiK2ForCausalLM", {}, "tp4"),
    ("Qwen2MoeForCausalLM", {}, "ep2 x pp2"),
    ("Glm4MoeForCausalLM", {}, "ep2 x pp2"),
    ("Ernie4_5_MoeForCausalLM", {}, "tp2"),
    ("HunYuanMoEV1ForCausalLM", {"num_experts": [8, 4], "moe_topk": [3, 1]}, "ep2"),
    # States and no pages on the first stage, pages and no states on the last.
    ("Qwen3NextForCausalLM", HYBRID, "pp3, uneven"),
    ("Qwen3NextForCausalLM", {}, "tp2 x pp2"),
    ("Qwen3NextForCausalLM", {}, "ep2"),
    ("Qwen3_5ForCausalLM", HYBRID, "pp2"),
    ("Qwen3NextForCausalLM", HYBRID, "pp2, layers move"),
    ("Qwen3NextForCausalLM", HYBRID, "tp2 x pp2, layers move"),
    ("Qwen3_5ForConditionalGeneration", {}, "tp4"),
    ("Qwen3_5MoeForConditionalGeneration", {}, "tp2"),
    ("GptOssForCausalLM", {"sliding_window": 20}, "tp2 x pp2"),
    ("GptOssForCausalLM", {"sliding_window": 20}, "ep2"),
    ("GptOssForCausalLM", {"sliding_window": 20} | GROUPS, "tp4"),
    ("Llama4ForCausalLM", {"attention_chunk_size": 20}, "tp2 x pp2"),
    ("MiniMaxM2ForCausalLM", {}, "tp4"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    over = LAYERS | VOCAB
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "Qwen3ForCausalLM", seed=3, **over)


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[LLM]:
    """One rank, with room for everything."""
    with LLM(str(model), num_pages=400, **SMALL) as llm:
        yield llm


@pytest.fixture(
    scope="module", params=["tp2", "pp2", "pp2, in phases", "pp2, layers move", "pp3, uneven"]
)
def group(model: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with restless_layers() as cuts, LLM(str(model), **TIGHT, **WAYS[request.param]) as llm:
        yield llm
        settle(llm)
        assert len(set(cuts)) == 2 * bool(llm.config.spare_layers)


def settle(llm: LLM) -> None:
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()
    assert llm.engine.stats().kv_usage == 0


def compare(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for ours, twin in zip(found, expected, strict=True):
        assert ours.error is None
        for one, other in zip(ours.outputs, twin.outputs, strict=True):
            assert (one.token_ids, one.text) == (other.token_ids, other.text)
            assert one.finish_reason == other.finish_reason
            compare_scores(one.logprobs, other.logprobs)
        compare_scores(ours.prompt_logprobs, twin.prompt_logprobs)


def compare_scores(found: Any, expected: Any) -> None:
    assert (found is None) == (expected is None)
    for ours, twin in zip(found or (), expected or (), strict=True):
        assert (ours is None) == (twin is None)
        for token, score in (ours or {}).items():
            assert score["logprob"] == pytest.approx(twin[token]["logprob"], abs=1e-4)


def can_draw(llm: LLM) -> bool:
    return llm.config.tensor_parallel_size == 1


def test_every_kind_of_request_at_once(group: LLM, alone: LLM) -> None:
    kinds = FIRM + (DRAWN if can_draw(group) else [])
    prompts, params = zip(*((p, kind) for kind in kinds for p in PROMPTS), strict=True)
    before = group.engine.stats().preemptions
    found = group.generate(list(prompts), list(params))
    compare(found, alone.generate(list(prompts), list(params)))
    assert group.engine.stats().preemptions > before
    answers = [o.outputs[0].text for o, kind in zip(found, params, strict=True) if kind is STRICT]
    assert all(re.fullmatch(FORM, answer) for answer in answers), answers
    settle(group)


def test_what_is_cached_is_not_computed_again(group: LLM, alone: LLM) -> None:
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0]):
        (found,) = group.generate(prompt, GREEDY)
        compare([found], alone.generate(prompt, GREEDY))
    assert found.num_cached_tokens >= len(found.prompt_token_ids) - 3


def test_cancelled_in_the_middle(group: LLM, alone: LLM) -> None:
    """The slot and pages of one that was cancelled go to others while its steps are under way."""
    endless = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    expected = alone.generate(PROMPTS[2], endless)[0].outputs[0].token_ids
    for taken in (1, 2, 5):
        streams = [group.stream(PROMPTS[2], endless) for _ in range(3)]
        for stream in streams:
            tokens = [id for delta in islice(stream, taken) for id in delta.token_ids]
            assert tokens == expected[: len(tokens)] and len(tokens) >= taken
        for stream in streams:
            stream.close()
        compare(group.generate(PROMPTS, GREEDY), alone.generate(PROMPTS, GREEDY))
    settle(group)


def test_a_mask_that_allows_nothing_costs_its_step_and_not_the_group(
    group: LLM, alone: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank refuses the step, and not only the last stage, which is the one to use masks."""
    group.generate([PROMPTS[2]], [STRICT])  # its grammar is ready: both requests are in one step
    with monkeypatch.context() as patch:
        patch.setattr(Constraint, "__call__", lambda constraint, tokens: b"\0")
        found = group.generate([PROMPTS[2], PROMPTS[1]], [STRICT, GREEDY])
    sentence = (
        "The engine failed in a step that computed this request "
        r"\(PlanError: slot \d+: its token mask allows no token\)"
    )
    for output in found:
        assert re.search(sentence, str(output.error)), output.error
    settle(group)
    compare(group.generate(PROMPTS, GREEDY), alone.generate(PROMPTS, GREEDY))
    settle(group)


@pytest.mark.parametrize(("family", "over", "way"), FAMILIES)
def test_families(tmp_path: Path, family: str, over: dict[str, Any], way: str) -> None:
    write_tiny_model(tmp_path, family, seed=3, **over)
    kinds = [GREEDY, SCORED] * 2  # in turns: of a prompt they give the same tokens
    with LLM(str(tmp_path), **SMALL, num_pages=400) as llm:
        expected = llm.generate(PROMPTS, kinds)
    config = tiny_config(family, **over)
    # Layers with a window and layers without one take pages from the same pool.
    windows = {"max_window_layers", "layer_types", "attention_chunk_size"}
    room = {"num_pages": 150} if windows & config.keys() else {}
    if read_arch(tmp_path).keeps_states:
        room = {"num_snapshots": 20}
    with restless_layers() as cuts, LLM(str(tmp_path), **(TIGHT | WAYS[way] | room)) as llm:

        def serve() -> None:
            compare(llm.generate(PROMPTS, kinds), expected)

        serve_until_moved(llm, cuts, serve)
        settle(llm)
