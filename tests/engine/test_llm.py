"""The whole engine on real (tiny) models: however a text is computed, it is the same text."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from gllm_engine.engine.core import EngineBroken
from gllm_engine.engine.llm import LLM, RequestFailed
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.sampling import InvalidField, SamplingParams, StructuredOutputs
from gllm_engine.types import Request

SOME_WINDOWS = "Qwen2ForCausalLM, windows"
HYBRID = "Qwen3NextForCausalLM"
WINDOW = 40
FAMILIES = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen3ForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    HYBRID,
    "GlmMoeDsaForCausalLM",
    "GptOssForCausalLM",
    "Llama4ForCausalLM",
    SOME_WINDOWS,
]
OVER = {
    SOME_WINDOWS: {
        "num_hidden_layers": 5,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "GlmMoeDsaForCausalLM": {
        "num_hidden_layers": 3,
        "indexer_types": ["full", "full", "shared"],
    },
    "GptOssForCausalLM": {"sliding_window": WINDOW},
    "Llama4ForCausalLM": {"attention_chunk_size": WINDOW},
}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=60, min_p=0.01, seed=7, max_tokens=24,
                        ignore_eos=True)  # fmt: skip
PENALIZED = SamplingParams(seed=11, max_tokens=24, ignore_eos=True, repetition_penalty=1.3,
                           presence_penalty=0.4, frequency_penalty=0.3)  # fmt: skip
KINDS = [GREEDY, SEEDED, PENALIZED]
SMALL = {"max_model_len": 512, "num_pages": 200, "max_num_seqs": 16}
# Longer than all windows, with a common beginning of several pages.
PROMPTS = [
    "the quick brown fox jumps over the lazy dog, " * 4 + ending
    for ending in ("and the cat sleeps", "世界 and more", "!", "which is a longer ending of it all")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, str] = {}

    def model(family: str = FAMILIES[0]) -> str:
        if family not in made:
            directory = tmp_path_factory.mktemp("model")
            name = family.partition(",")[0]
            over = OVER.get(family, {})
            made[family] = str(write_tiny_model(directory, name, seed=3, **over))
        return made[family]

    return model


@pytest.fixture
def load(models):
    made = []

    def load(family: str = FAMILIES[0], **over):
        # Of so small a cache, an eighth is less than one state.
        states = {"num_snapshots": 30} if family == HYBRID else {}
        made.append(LLM(models(family), **(SMALL | states | over)))
        return made[-1]

    yield load
    for llm in made:
        assert not llm.engine.has_work
        llm.engine.check_integrity()
        assert llm.engine.stats().kv_usage == 0
        llm.close()


def tokens_of(outputs):
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(models):
    """The slow twin: one sequence at a time, whole prompt in one chunk, no prefix cache."""
    made = {}

    def alone(family, kind):
        if (family, kind.seed) not in made:
            with LLM(models(family), **SMALL, enable_prefix_caching=False) as llm:
                made[family, kind.seed] = [tokens_of(llm.generate(p, kind))[0] for p in PROMPTS]
        return made[family, kind.seed]

    return alone


THROTTLED = {
    "schedule_policy": "token_throttling",
    "max_num_batched_tokens": 32,
    "min_prefill_tokens": 4,
}
WAYS = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 16, "enable_prefix_caching": False},
    "two plans in flight": {"plans_in_flight": 2, "enable_prefix_caching": False},
    "three plans, chunks, cache": {"plans_in_flight": 3, "max_num_batched_tokens": 24},
    "preempted": {"num_pages": 126, "page_size": 2, "enable_prefix_caching": False},
    "preempted, two plans, cache": {"num_pages": 104, "page_size": 2, "plans_in_flight": 2},
    "throttled": THROTTLED | {"plans_in_flight": 1},
    "throttled, two plans": THROTTLED | {"plans_in_flight": 2},
    "preempted, throttled, four plans": THROTTLED
    | {"plans_in_flight": 4, "num_pages": 104, "page_size": 2},
}


# Pages that sequences of a model with windows lack while they grow, for each of its cache groups.
SCARCE = {"preempted": 140} | {way: 87 for way in WAYS if way.startswith("preempted,")}
GROUPS = {SOME_WINDOWS: 3, "GptOssForCausalLM": 8 / 7, "Llama4ForCausalLM": 8 / 7}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_tokens(load, alone, family, way):
    over = {}
    if family in GROUPS and way in SCARCE:
        over = {"num_pages": int(SCARCE[way] * GROUPS[family]), "max_num_batched_tokens": 16}
    llm = load(family, **WAYS[way] | over)
    for kind in KINDS:
        assert tokens_of(llm.generate(PROMPTS, kind)) == alone(family, kind)
    # Beyond its window a sequence of Mistral takes no more pages, and preempts no other one.
    if "preempted" in way and family != "MistralForCausalLM":
        assert llm.engine.stats().preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_hit_gives_the_same_tokens(load, alone, family):
    llm = load(family)
    for kind in KINDS:
        outputs = [llm.generate(prompt, kind)[0] for prompt in PROMPTS]
        assert tokens_of(outputs) == alone(family, kind)
        assert all(output.num_cached_tokens >= 32 for output in outputs[1:])
    # Told also if a stop string ends the answer, here at its first token.
    stop = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].text[:1]
    again = llm.generate(PROMPTS[0], replace(GREEDY, stop=(stop,)))[0]
    assert again.outputs[0].stop_reason == stop
    assert again.num_cached_tokens >= len(again.prompt_token_ids) - 17


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", HYBRID])
def test_a_float8_cache_changes_nothing_but_numbers(load, alone, family):
    """Chunks, preemption and prefix hits over it give one text, though another than without it."""
    float8 = {"kv_cache_dtype": "fp8"}
    plain = load(family, **float8, enable_prefix_caching=False)
    expected = [tokens_of(plain.generate(prompt, GREEDY))[0] for prompt in PROMPTS]
    if family != HYBRID:  # of which one layer has K and V
        assert expected != alone(family, GREEDY)
    for way in ("three plans, chunks, cache", "preempted, two plans, cache"):
        llm = load(family, **float8, **WAYS[way])
        assert tokens_of(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.engine.stats().preemptions > 0 or "preempted" not in way
    llm = load(family, **float8)
    outputs = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    assert tokens_of(outputs) == expected
    assert all(output.num_cached_tokens >= 32 for output in outputs[1:])


def test_turns_of_a_conversation_are_found(load):
    """Of a model with states: 8 turns of 62 pages, as 500 tokens are of pages of 8."""
    llm = load(HYBRID, page_size=2, num_pages=600, max_model_len=1024, plans_in_flight=2)
    turns = [some_tokens(62, seed) for seed in range(8)]
    params = SamplingParams(temperature=0, max_tokens=62, ignore_eos=True)
    known = []
    answers = []
    found = asked = 0
    for turn in turns:
        (output,) = llm.generate([known + turn], params)
        found += output.num_cached_tokens
        asked += len(known)
        answers.append(output.outputs[0].token_ids)
        known += turn + answers[-1]
    assert found >= 0.9 * asked
    stats = llm.engine.stats()
    assert (stats.answer_snapshot_hits, stats.prompt_snapshot_hits) == (7, 0)
    assert stats.prefix_hits == found <= stats.prefix_stored
    cold = load(HYBRID, max_model_len=1024, enable_prefix_caching=False)
    for end, answer in ((124 * 3, answers[3]), (124 * 7, answers[7])):
        assert tokens_of(cold.generate([known[: end + 62]], params)) == [[answer]]


def some_tokens(count, seed):
    return np.random.default_rng(seed).integers(3, 384, count).tolist()


def test_states_are_lost_before_keys_and_values(load, alone):
    """With too few snapshots a prompt is computed again, though its pages are there."""
    llm = load(HYBRID, num_snapshots=1, max_num_seqs=2)
    for _ in range(2):
        outputs = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
        assert tokens_of(outputs) == alone(HYBRID, GREEDY)
    stats = llm.engine.stats()
    assert stats.prefix_stored > stats.prefix_hits
    none = load(HYBRID, num_snapshots=0)
    assert tokens_of(none.generate(PROMPTS, GREEDY)) == alone(HYBRID, GREEDY)
    assert none.engine.stats().prefix_hits == 0


def test_logprobs_are_the_same_however_computed(load):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1)
    whole = load().generate(PROMPTS, params)
    chunked = load(max_num_batched_tokens=16, plans_in_flight=2).generate(PROMPTS, params)
    for one, other in zip(whole, chunked, strict=True):
        assert one.prompt_logprobs[0] is None
        assert len(one.prompt_logprobs) == len(one.prompt_token_ids)
        for position, id in enumerate(one.prompt_token_ids[1:], 1):
            entry = one.prompt_logprobs[position]
            assert next(iter(entry)) == id
            assert entry.keys() == other.prompt_logprobs[position].keys()
            assert entry[id]["logprob"] == pytest.approx(
                other.prompt_logprobs[position][id]["logprob"], abs=1e-4
            )
        made = one.outputs[0]
        assert len(made.logprobs) == len(made.token_ids)
        actual = [entry[id] for entry, id in zip(made.logprobs, made.token_ids, strict=True)]
        assert all(entry["rank"] == 1 for entry in actual)
        assert made.cumulative_logprob == pytest.approx(sum(entry["logprob"] for entry in actual))


@pytest.mark.parametrize("family", [FAMILIES[0], HYBRID])
def test_n_outputs_differ_and_the_first_is_that_of_one(load, family):
    llm = load(family)
    three = llm.generate("Hello", SamplingParams(n=3, seed=5, max_tokens=12))[0].outputs
    assert [output.index for output in three] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in three}) == 3
    one = llm.generate("Hello", SamplingParams(seed=5, max_tokens=12))[0].outputs[0]
    assert one == three[0]
    again = llm.generate("Hello", SamplingParams(n=3, seed=5, max_tokens=12))[0].outputs
    assert again == three
    unseeded = [llm.generate("Hello", SamplingParams(max_tokens=12))[0] for _ in range(2)]
    assert unseeded[0].outputs[0].token_ids != unseeded[1].outputs[0].token_ids


def test_a_stream_is_what_generate_gives(load):
    llm = load(plans_in_flight=2)
    whole = llm.generate("Hello", SEEDED)[0].outputs[0]
    deltas = list(llm.stream("Hello", SEEDED))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [id for delta in deltas for id in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_streams_may_be_mixed_and_left(load):
    llm = load()
    left, kept = llm.stream("Hello", SEEDED), llm.stream("the fox", GREEDY)
    start = next(left)
    assert len(start.token_ids) == 1
    texts = [next(kept).text]
    between = llm.generate("the fox", GREEDY)[0].outputs[0].text
    left.close()
    texts += [delta.text for delta in kept]
    assert "".join(texts) == between
    assert not llm.engine.has_work


def test_a_stop_string_ends_the_sequence_in_the_engine(load):
    llm = load(plans_in_flight=2)
    text = llm.generate("Hello", GREEDY)[0].outputs[0].text
    stop = next(text[at : at + 2] for at in range(4, len(text)) if text[at : at + 2].isalpha())
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=(stop,))
    output = llm.generate("Hello", params)[0].outputs[0]
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert "".join(delta.text for delta in llm.stream("Hello", params)) == output.text
    # Lists and single strings are taken as well as tuples.
    loose = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=[stop])
    assert llm.generate("Hello", loose)[0].outputs[0] == output
    while llm.engine.has_work:  # what was in flight when it ended
        assert llm.engine.step() == {}


def test_no_max_tokens_means_the_models_length(load):
    unlimited = SamplingParams(max_tokens=None, ignore_eos=True)
    (output,) = load(max_model_len=64).generate([[5] * 20], unlimited)
    assert len(output.outputs[0].token_ids) == 44
    assert output.outputs[0].finish_reason == "length"


def test_end_of_sequence_and_stop_tokens(load):
    llm = load()
    third = llm.generate("Hello", GREEDY)[0].outputs[0].token_ids[2]
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(third,))
    output = llm.generate("Hello", params)[0].outputs[0]
    assert output.token_ids[-1] == third and len(output.token_ids) <= 3
    assert (output.finish_reason, output.stop_reason) == ("stop", third)
    waits = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=(third,), min_tokens=8)
    assert third not in llm.generate("Hello", waits)[0].outputs[0].token_ids[:7]
    eos = llm.engine.info.eos_token_ids[0]
    forced = SamplingParams(logit_bias={eos: 100.0}, max_tokens=5)
    output = llm.generate("Hello", forced)[0].outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("", [eos], None)


def test_only_allowed_token_ids_are_sampled(load):
    llm = load(plans_in_flight=2)
    ids = (65, 300, 301)
    for kind in KINDS:
        ((tokens,),) = tokens_of(llm.generate(PROMPTS[0], replace(kind, allowed_token_ids=ids)))
        assert len(tokens) == 24 and set(tokens) <= {*ids}
        # They are chosen as if all others were far below them.
        biased = replace(kind, logit_bias=dict.fromkeys(ids, 100.0))
        assert kind is PENALIZED or [[tokens]] == tokens_of(llm.generate(PROMPTS[0], biased))
    (output,) = llm.generate(PROMPTS[0], replace(GREEDY, allowed_token_ids=(65, 384)))
    assert output.error == "allowed_token_ids: token id 384 is outside [0, 383]"


def test_the_end_of_a_prompt_is_read(load):
    llm = load()
    ids = llm.tokenizer.encode(PROMPTS[0])
    (output,) = llm.generate(PROMPTS[0], replace(GREEDY, truncate_prompt_tokens=9))
    assert output.prompt_token_ids == ids[-9:]
    assert output.outputs == llm.generate([ids[-9:]], GREEDY)[0].outputs
    for params in (GREEDY, replace(GREEDY, max_tokens=None), replace(GREEDY, max_tokens=5000)):
        params = replace(params, truncate_prompt_tokens=-1)
        (output,) = llm.generate([[5] * 2000], params)
        assert output.error is None
        room = min(params.max_tokens or 1, 511)
        assert len(output.prompt_token_ids) == 512 - room
        assert len(output.outputs[0].token_ids) == room


def test_errors_of_one_prompt_lose_no_other(load):
    llm = load()
    prompts = ["Hello", [5, 100_000], [], "a" * 3000, "bad \ud800", [5, 6, 7], [5, -1], [2**40]]
    outputs = llm.generate(prompts, GREEDY)
    errors = [output.error for output in outputs]
    assert errors[0] is None and errors[5] is None
    assert errors[1] == "input_ids: token id 100000 is outside [0, 383]"
    assert errors[2] == "prompt: it is empty, at least one token is needed"
    assert "limited to 512 tokens" in errors[3]
    assert errors[6] == "input_ids: token id -1 is outside [0, 383]"
    assert errors[7] == f"input_ids: token id {2**40} is outside [0, 383]"
    assert errors[4] == "prompt: holds a lone surrogate"
    assert all(output.finished for output in outputs)
    assert len(outputs[0].outputs[0].token_ids) == len(outputs[5].outputs[0].token_ids) == 24
    with pytest.raises(RequestFailed, match="outside"):
        list(llm.stream([100_000]))
    with pytest.raises(InvalidField, match="n: 2 outputs cannot be streamed"):
        llm.stream("Hello", SamplingParams(n=2))
    with pytest.raises(InvalidField, match="temperature"):
        llm.generate("Hello", SamplingParams(stop_token_ids=["x"], temperature=True))
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate("Hello", [GREEDY, GREEDY])


@pytest.mark.parametrize("bound", [{"max_waiting": 3}, {"max_waiting_tokens": 9}])
def test_more_prompts_than_the_queue_takes(load, bound):
    llm = load(**bound, max_num_seqs=2)
    params = [SamplingParams(temperature=0, max_tokens=1 + i % 5, n=1 + i % 3) for i in range(20)]
    outputs = llm.generate([[5, 6, 7 + i] for i in range(20)], params)
    assert [output.error for output in outputs] == [None] * 20
    assert [output.prompt_token_ids[2] for output in outputs] == list(range(7, 27))
    # One that could never be queued whole says so, and does not hang.
    (output,) = llm.generate("Hello", SamplingParams(n=8, max_tokens=2))
    assert "queue is full" in output.error


def fill_queue(llm, num):
    """Requests of somebody else, which nobody reads; their ids are not those of an LLM."""
    for id in range(-num, 0):
        llm.engine.add(Request(id, [5, 6], GREEDY, seed=0), client="other")


def test_a_stream_on_a_full_queue_says_so(load):
    llm = load(max_waiting=2)
    running = llm.stream("the fox", GREEDY)
    next(running)
    fill_queue(llm, 2)
    with pytest.raises(RequestFailed, match="the queue is full: 2 requests are waiting"):
        next(llm.stream("Hello", GREEDY))
    llm.engine.drop("other")
    assert len(list(running)) == 23
    assert len(list(llm.stream("Hello", GREEDY))) == 24


def test_a_prompt_refused_in_part_is_not_computed_in_part(load):
    """Four sequences, of which the queue takes three: all are given up."""
    llm = load(max_waiting=3)
    long = SamplingParams(n=4, max_tokens=400, ignore_eos=True)
    (output,) = llm.generate("Hello", long)
    assert "the queue is full: 3" in output.error and output.finished
    assert llm.engine.stats().steps < 5 and not llm.engine.has_work


def test_a_stream_of_a_closed_llm_ends(models):
    with LLM(models(), **SMALL) as llm:
        stream = llm.stream("Hello", GREEDY)
        next(stream)
    with pytest.raises(EngineBroken, match="closed"):
        list(stream)
    with pytest.raises(EngineBroken, match="closed"):
        llm.generate("Hello", GREEDY)


def test_token_ids_may_be_any_whole_numbers_and_nothing_else(load):
    llm = load()
    (expected,) = tokens_of(llm.generate([[5, 6]], GREEDY))
    for prompts in (np.array([5, 6]), [np.array([5, 6])], [np.int64(5), np.int32(6)], [(5, 6)]):
        assert tokens_of(llm.generate(prompts, GREEDY)) == [expected]
    wrong = [[5, 6.5], ["a"], None, b"ab", [None], 7.5]
    outputs = llm.generate([*wrong, [5, 6]], GREEDY)
    for output in outputs[:-1]:
        assert output.error.startswith("prompt: text or a list of token ids (whole numbers) is")
    assert tokens_of(outputs[-1:]) == [expected]
    with pytest.raises(InvalidField, match="sampling_params: a SamplingParams is expected, got d"):
        llm.generate(["Hello"], [{"max_tokens": 3}])


def test_one_bad_conversation_loses_no_other(load):
    llm = load()
    good = [{"role": "user", "content": "Hello"}]
    first, bad, last = llm.chat([good, [{"role": "user", "content": 5}], good], GREEDY)
    assert bad.error == "messages: message 0 has no content (a string)"
    assert tokens_of([first]) == tokens_of([last]) == tokens_of(llm.chat(good, GREEDY))


def test_chat_answers_one_or_several_conversations(load):
    llm = load()
    one = [{"role": "user", "content": "Hello"}]
    output = llm.chat(one, GREEDY)[0]
    assert output.prompt_token_ids == llm.tokenizer.chat(one)
    both = llm.chat([one, one], GREEDY)
    assert [o.outputs[0].token_ids for o in both] == [output.outputs[0].token_ids] * 2


def test_chat_takes_tools_and_template_variables(load):
    llm = load()
    one = [{"role": "user", "content": "Hello"}]
    bare = llm.chat(one, GREEDY, chat_template_kwargs={"add_generation_prompt": False})[0]
    asked = llm.chat(one, GREEDY)[0]
    assert asked.prompt_token_ids[: len(bare.prompt_token_ids)] == bare.prompt_token_ids
    assert len(bare.prompt_token_ids) < len(asked.prompt_token_ids)
    with pytest.raises(InvalidField, match="tools: this model's chat template takes no tools"):
        llm.chat(one, GREEDY, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(InvalidField, match="chat_template_kwargs: 'thinking' means nothing to"):
        llm.chat(one, GREEDY, chat_template_kwargs={"thinking": True})


@pytest.mark.parametrize("configured", [5, None])
def test_the_tokenizers_end_token_ends_a_text_too(tmp_path, configured):
    """The configuration says another one, or none: chat models are often published so."""
    directory = write_tiny_model(tmp_path, seed=3, eos_token_id=configured)
    (directory / "generation_config.json").unlink()
    with LLM(str(directory), **SMALL) as llm:
        end = llm.tokenizer.eos_token_id
        assert end == 2
        assert llm.engine.info.eos_token_ids == ((5, 2) if configured else (2,))
        likely = {"logit_bias": {end: 100.0}, "temperature": 0, "max_tokens": 8}
        ended, later, never = llm.generate(
            ["Hello"] * 3,
            [
                SamplingParams(**likely),
                SamplingParams(**likely, min_tokens=4),
                SamplingParams(**likely, ignore_eos=True),
            ],
        )
        assert ended.outputs[0].token_ids == [end] and ended.outputs[0].finish_reason == "stop"
        assert len(later.outputs[0].token_ids) == 5 and later.outputs[0].token_ids[4:] == [end]
        assert end not in later.outputs[0].token_ids[:4]
        assert never.outputs[0].token_ids == [end] * 8
        choice = StructuredOutputs(choice=("yes", "no"))
        (chosen,) = llm.generate("Hello", SamplingParams(structured_outputs=choice))
        assert chosen.error is None and chosen.outputs[0].text in ("yes", "no")
        assert chosen.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_structured_outputs_hold_beside_free_ones(load, alone, family, depth):
    llm = load(family, plans_in_flight=depth, max_num_batched_tokens=32)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0},
                       "b": {"enum": ["x", "日本", True]}},
        "required": ["a", "b"], "additionalProperties": False, "x-guidance":
        {"whitespace_flexible": False},
    }  # fmt: skip
    as_json = SamplingParams(
        structured_outputs=StructuredOutputs(json=json.dumps(schema)), max_tokens=99, seed=1
    )
    regex = r"[a-f]{3}-(\d\d|日本)!"
    as_regex = SamplingParams(
        structured_outputs=StructuredOutputs(regex=regex), max_tokens=99, seed=1, min_tokens=1
    )
    outputs = llm.generate(
        [PROMPTS[0], *PROMPTS[:2], PROMPTS[1]], [as_json, GREEDY, GREEDY, as_regex]
    )
    value = json.loads(outputs[0].outputs[0].text)
    assert set(value) == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "日本", True)
    assert re.fullmatch(regex, outputs[3].outputs[0].text)
    assert outputs[0].outputs[0].finish_reason == outputs[3].outputs[0].finish_reason == "stop"
    assert tokens_of(outputs[1:3]) == alone(family, GREEDY)[:2]


def test_structured_outputs_survive_preemption(load):
    regex = "([a-f]{2} ){30}"
    params = SamplingParams(
        structured_outputs=StructuredOutputs(regex=regex), max_tokens=200, temperature=0
    )
    whole = load().generate(PROMPTS, params)
    llm = load(num_pages=64, page_size=4, enable_prefix_caching=False)
    pressed = llm.generate(PROMPTS, params)
    assert llm.engine.stats().preemptions > 0
    assert tokens_of(pressed) == tokens_of(whole)
    assert all(re.fullmatch(regex, output.outputs[0].text) for output in pressed)


def test_bad_words_never_appear(load):
    llm = load()
    free = llm.generate("Hello", GREEDY)[0].outputs[0]
    words = sorted(set(re.findall(r"[A-Za-z]{2,}", free.text)))
    assert words
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, bad_words=tuple(words))
    output = llm.generate("Hello", params)[0].outputs[0]
    banned = llm.tokenizer.bad_words(words)
    ids = output.token_ids
    for sequence in banned:
        size = len(sequence)
        assert all(tuple(ids[at : at + size]) != sequence for at in range(len(ids)))
    assert ids[:24] != free.token_ids


def test_a_closed_llm_is_closed_twice(models):
    with LLM(models(), **SMALL) as llm:
        llm.generate("Hello", GREEDY)
    llm.close()


def test_a_broken_engine_is_raised(load, monkeypatch):
    llm = load()

    def fail(plan):
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._runner, "launch", fail)
        for _ in range(2):
            (output,) = llm.generate("a", GREEDY)
            assert "ValueError" in output.error
        for _ in range(2):
            with pytest.raises(EngineBroken, match=r"3 steps of the engine failed in a row \(Val"):
                llm.generate("a", GREEDY)
    with pytest.raises(EngineBroken):
        list(llm.stream("a", GREEDY))


def test_a_window_keeps_only_what_it_shows(load, alone):
    """A sequence may be far longer than the cache, with penalties and prefix hits all the same."""
    family = "MistralForCausalLM"
    llm = load(family, num_pages=10, max_num_batched_tokens=32)
    assert llm.engine.info.max_model_len == 512 > 10 * llm.engine.info.page_size
    for kind in KINDS:
        assert tokens_of(llm.generate(PROMPTS, kind)) == alone(family, kind)
    hits = llm.engine.stats().prefix_hits
    again = llm.generate(PROMPTS[-1], PENALIZED)  # its own last pages were the last to be used
    assert tokens_of(again)[0] == alone(family, PENALIZED)[-1]
    assert llm.engine.stats().prefix_hits > hits


def test_windows_leave_more_pages_to_others(models):
    """Of 5 layers 3 have a window: a page has 2 layers, and windows two of the three tables."""
    config = SMALL | {"max_num_batched_tokens": 32, "enable_prefix_caching": False}
    usage = []
    with LLM(models(SOME_WINDOWS), **config) as llm:
        page_size = llm.engine.info.page_size
        (alone,) = llm.generate(PROMPTS[0], GREEDY)
        num_tokens = len(alone.prompt_token_ids) + len(alone.outputs[0].token_ids)
        for _ in llm.stream(PROMPTS[0], GREEDY):
            usage.append(round(llm.engine.stats().kv_usage * config["num_pages"]))
    whole = -(-num_tokens // page_size)
    shown = -(-(WINDOW + 32) // page_size) + 1
    assert whole > shown and max(usage) <= whole + 2 * shown < 3 * whole


def test_conversations_of_a_hybrid_model_find_their_last_turn(tmp_path: Path) -> None:
    """8 turns of 500 tokens: of what a turn has in common with the turn before, 90 % are found."""
    model = write_tiny_model(tmp_path, "Qwen3_5ForCausalLM", max_position_embeddings=8192)
    config = {
        "device": "none",
        "num_pages": 2000,
        "num_snapshots": 8,
        "max_num_batched_tokens": 512,
    }
    sampling = SamplingParams(max_tokens=250, ignore_eos=True)
    rng = random.Random(1)
    with LLM(str(model), **config) as llm:
        texts: list[list[int]] = [[] for _ in range(4)]
        for turn in range(8):
            known = sum(map(len, texts))
            prompts = [text + rng.choices(range(3, 300), k=250) for text in texts]
            outputs = llm.generate(prompts, sampling)
            assert sum(output.num_cached_tokens for output in outputs) >= 0.9 * known, turn
            texts = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
        stats = llm.engine.stats()
        assert stats.answer_snapshot_hits == 4 * 7
        llm.engine.check_integrity()
