"""Stop strings, ends and log probabilities, against a naive twin that sees the text at once."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gllm_engine.sampling import SamplingParams
from gllm_engine.text.completion import Completion
from gllm_engine.types import Finish, TokenLogprobs

EXAMPLES = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Spelled:
    """A tokenizer whose token i reads as `spelling[i]`."""

    leading_spaces = 0

    def __init__(self, spelling: list[str]) -> None:
        self.spelling = self
        self._pieces = {id: text.encode() for id, text in enumerate(spelling)}

    def pieces(self, skip_special_tokens):
        return self._pieces

    def first_piece(self, id):
        return self._pieces[id]

    def token_text(self, id):
        return self._pieces[id].decode()


def naive(spelling, tokens, stops, min_tokens, include):
    """(text, tokens used, stop): look at the whole text again after each character."""
    text = ""
    for count, id in enumerate(tokens, 1):
        for char in spelling[id]:
            text += char
            ended = [stop for stop in stops if text.endswith(stop)]
            if ended and count >= min_tokens:
                stop = max(ended, key=len)
                return text if include else text[: -len(stop)], count, stop
    return text, len(tokens), None


def run(completion, tokens, sizes, finish):
    """Feed in pieces of `sizes`; the finish comes with the last. Returns the deltas."""
    deltas, at = [], 0
    while at < len(tokens):
        size = sizes[len(deltas) % len(sizes)]
        last = at + size >= len(tokens)
        deltas.append(completion.feed(tokens[at : at + size], (), finish if last else None))
        at += size
    return [delta for delta in deltas if delta is not None]


@EXAMPLES
@given(
    spelling=st.lists(st.text("abc", max_size=4), min_size=2, max_size=6),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    order=st.lists(st.integers(0, 5), min_size=1, max_size=25),
    min_tokens=st.integers(0, 10),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    include=st.booleans(),
)
@example(["aa", "b"], ["aab", "a"], [0, 0, 1], 3, [2], False)
def test_no_text_is_lost_or_doubled(spelling, stops, order, min_tokens, sizes, include):
    tokens = [index % len(spelling) for index in order]
    sampling = SamplingParams(
        stop=tuple(stops), min_tokens=min_tokens, max_tokens=None,
        include_stop_str_in_output=include,
    )  # fmt: skip
    completion = Completion(Spelled(spelling), [], sampling)
    deltas = run(completion, tokens, sizes, Finish("length"))
    text, used, stop = naive(spelling, tokens, stops, min_tokens, include)
    assert "".join(delta.text for delta in deltas) == text
    assert [id for delta in deltas for id in delta.token_ids] == tokens[:used]
    assert completion.num_tokens == used
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == ("length" if stop is None else "stop")
    assert deltas[-1].stop_reason == stop
    assert completion.feed([0]) is None


@EXAMPLES
@given(
    spelling=st.lists(st.text("abc", max_size=3), min_size=2, max_size=6),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    order=st.lists(st.integers(0, 5), min_size=1, max_size=20),
)
def test_only_a_possible_stop_is_held_back(spelling, stops, order):
    tokens = [index % len(spelling) for index in order]
    completion = Completion(Spelled(spelling), [], SamplingParams(stop=tuple(stops)))
    shown = ""
    for count, id in enumerate(tokens, 1):
        shown += completion.feed([id]).text
        if completion.finished:
            return
        text = "".join(spelling[t] for t in tokens[:count])
        beginnings = [s[:k] for s in stops for k in range(1, len(s)) if text.endswith(s[:k])]
        assert shown == text[: len(text) - max(map(len, beginnings), default=0)]


def test_a_stop_string_asks_for_an_abort_once_it_is_complete():
    completion = Completion(Spelled(["St", "op", "py"]), [], SamplingParams(stop=("Stop",)))
    assert completion.feed([0]).text == "" and not completion.wants_abort
    delta = completion.feed([1, 2])
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [1], "stop")
    assert delta.stop_reason == "Stop" and completion.wants_abort
    assert completion.feed([2], (), Finish("abort", status="cancelled")) is None


def test_no_abort_is_asked_of_an_engine_that_has_ended():
    completion = Completion(Spelled(["Stop"]), [], SamplingParams(stop=("Stop",)))
    assert completion.feed([0], (), Finish("length")).finish_reason == "stop"
    assert not completion.wants_abort


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", [(), ("never",)])
def test_the_text_of_a_stop_token_is_not_shown(include, stop):
    sampling = SamplingParams(
        stop=stop, stop_token_ids=(1,), include_stop_str_in_output=include, logprobs=0
    )
    completion = Completion(Spelled(["a", "END"]), [], sampling)
    entries = [TokenLogprobs([id], [-0.5], [1]) for id in (0, 1)]
    delta = completion.feed([0, 1], entries, Finish("stop", stop_token=1))
    assert delta.text == ("aEND" if include else "a")
    assert delta.token_ids == [0, 1] and len(delta.logprobs) == 2
    assert (delta.finish_reason, delta.stop_reason) == ("stop", 1)


def test_end_of_sequence_has_no_stop_reason():
    completion = Completion(Spelled(["a", "</s>"]), [], SamplingParams())
    delta = completion.feed([0, 1], (), Finish("stop", stop_token=1))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", "stop", None)


def test_held_text_comes_out_at_an_error():
    completion = Completion(Spelled(["hal"]), [], SamplingParams(stop=("half",)))
    assert completion.feed([0]).text == ""
    delta = completion.feed([], (), Finish("error", status="internal", message="broken"))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("hal", [], "error")


def test_logprobs_have_the_shape_of_the_vllm_backend():
    completion = Completion(
        Spelled(["a", "b", "c"]), [], SamplingParams(logprobs=2, stop=("c",), max_tokens=9)
    )
    first = TokenLogprobs([1, 0, 1], [-2.0, -0.5, -2.0], [2, 1, 2])
    delta = completion.feed([1], [first])
    assert delta.logprobs == [
        {
            1: {"logprob": -2.0, "rank": 2, "decoded_token": "b"},
            0: {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        }
    ]
    assert list(delta.logprobs[0]) == [1, 0]
    assert delta.cumulative_logprob == -2.0
    # Entries of tokens after the stop string are cut with them.
    more = [TokenLogprobs([id], [-1.0], [1]) for id in (0, 2, 0)]
    delta = completion.feed([0, 2, 0], more)
    assert len(delta.logprobs) == len(delta.token_ids) == 2
    assert delta.cumulative_logprob == -4.0


def test_without_logprobs_none_are_made():
    delta = Completion(Spelled(["a"]), [], SamplingParams()).feed([0])
    assert delta.logprobs is None and delta.cumulative_logprob is None


def test_stop_strings_meet_characters_of_several_tokens(tokenizer):
    output = tokenizer.encode("Grüße 🙂 日本!", add_special_tokens=False)
    completion = Completion(tokenizer, tokenizer.encode("x"), SamplingParams(stop=("🙂 日",)))
    deltas = run(completion, output, [1], Finish("length"))
    assert "".join(delta.text for delta in deltas).strip() == "Grüße"
    assert deltas[-1].stop_reason == "🙂 日"


def test_cost_a_token(tokenizer):
    output = tokenizer.encode("Hello world, hello there! 日本語 🙂 " * 100)
    stops = ("\n\n", "<|end|>", "User:", "###")
    best = 1.0
    for _ in range(5):
        completion = Completion(tokenizer, output[:5], SamplingParams(stop=stops))
        begin = time.thread_time()
        for id in output:
            completion.feed((id,))
        best = min(best, (time.thread_time() - begin) / len(output))
    assert best < 20e-6
