"""Masks: what a grammar and bad words allow next, and what happens when they cannot be followed."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import Future

import pytest

from gllm_engine.sampling import InvalidField, SamplingParams, StructuredOutputs
from gllm_engine.text.constraints import Constraint, Grammars
from gllm_engine.types import Request

PADDING = 13  # token ids of the model that the tokenizer does not have
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "日本", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocab_size(tokenizer):
    return tokenizer.vocab_size + PADDING


@pytest.fixture(scope="module")
def grammars(tokenizer, tokenizer_dir, vocab_size):
    # The second end token is one that only the padded model knows.
    made = Grammars(tokenizer_dir, vocab_size, (tokenizer.eos_token_id, vocab_size - 1))
    yield made
    made.close()


def make(grammars, bad_words=(), prompt=(5, 6), **asked) -> Constraint:
    structured = StructuredOutputs(**asked) if asked else None
    sampling = SamplingParams(structured_outputs=structured)
    constraint = grammars.constrain(Request(1, list(prompt), sampling, 0, bad_words))
    return constraint.result(timeout=30) if isinstance(constraint, Future) else constraint


def allowed(mask: bytes) -> list[int]:
    return [id for id in range(len(mask) * 8) if mask[id >> 3] >> (id & 7) & 1]


def walk(constraint, tokenizer, vocab_size, seed, *, blanks=False, max_tokens=400) -> str:
    """Text of a random way through the masks to the end; each token as likely as the others,
    but the end is taken when allowed, and white space never unless it must be (or: always)."""
    prompt = (5, 6)
    rng, tokens, eos = random.Random(seed), list(prompt), {tokenizer.eos_token_id, vocab_size - 1}
    for _ in range(max_tokens):
        mask = constraint(tokens)
        assert constraint(tokens) == mask and len(mask) == (vocab_size + 7) // 8
        ids = allowed(mask)
        assert ids and max(ids) < vocab_size
        ends = eos.intersection(ids)
        assert ends in (set(), eos)  # all ways to end, or none
        if ends:
            break
        wanted = [id for id in ids if bool(tokenizer.token_text(id).strip()) is not blanks]
        tokens.append(rng.choice(wanted or ids))
    else:
        pytest.fail("the grammar did not end")
    return tokenizer.decode([*prompt, *tokens[len(prompt) :]])[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize("seed", range(8))
def test_a_schema_gives_valid_json(grammars, tokenizer, vocab_size, seed):
    constraint = make(grammars, json=json.dumps(SCHEMA))
    value = json.loads(walk(constraint, tokenizer, vocab_size, seed))
    assert set(value) <= set(SCHEMA["properties"]) and {"name", "age"} <= set(value)
    assert isinstance(value["name"], str) and len(value["name"]) <= 4
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 99
    assert all(tag in ("a", "日本", None) for tag in value.get("tags", []))


def test_white_space_in_json_has_an_end(grammars, tokenizer, vocab_size):
    constraint = make(grammars, json=json.dumps(SCHEMA))
    text = walk(constraint, tokenizer, vocab_size, 0, blanks=True, max_tokens=1000)
    assert {"name", "age"} <= json.loads(text).keys()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("regex", [r"[0-9]{3}-[a-c]{1,4}x", r"(日|🙂){2}", r"\w{2} the (fox|dog)"])
def test_a_regex_is_matched(grammars, tokenizer, vocab_size, regex, seed):
    text = walk(make(grammars, regex=regex), tokenizer, vocab_size, seed)
    assert re.fullmatch(regex, text)


def test_choices_are_taken_literally(grammars, tokenizer, vocab_size):
    choices = ("yes", "no", 'quo"te\\d', "new\nline\x01\x7f", "日本 🙂", "/slash/i")
    made = {walk(make(grammars, choice=choices), tokenizer, vocab_size, seed) for seed in range(40)}
    assert made <= set(choices) and len(made) > 2


def test_a_lark_grammar_is_followed(grammars, tokenizer, vocab_size):
    grammar = 'start: "<" item ("," item)? ">"\nitem: "x" | NUMBER\nNUMBER: /[0-9]{2}/'
    for seed in range(5):
        text = walk(make(grammars, grammar=grammar), tokenizer, vocab_size, seed)
        assert re.fullmatch(r"<(x|\d\d)(,(x|\d\d))?>", text)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"json": '{"type": '}, "json is not JSON (Expecting value: line 1 column 10 (char 9))"),
        ({"json": "[" * 100_000}, "json is not JSON (maximum recursion"),
        ({"json": '{"type": "strin"}'}, "Invalid type: strin"),
        ({"json": '{"type": "array", "uniqueItems": true}'}, "uniqueItems"),
        ({"json": '{"$ref": "http://example.com/schema"}'}, "not fetch"),
        ({"json": "false"}, ""),
        ({"regex": "((("}, "unclosed group"),
        ({"regex": "(?=look)ahead"}, "look-around"),
        ({"grammar": "start: nothing"}, 'unknown name: "nothing"'),
        ({"grammar": "no start"}, ""),
    ],
)
def test_a_bad_grammar_gets_a_sentence(grammars, asked, sentence):
    for _ in range(2):  # failures are not remembered as anything else
        with pytest.raises(InvalidField, match=f"^structured_outputs: .*{re.escape(sentence)}"):
            make(grammars, **asked)
    make(grammars, choice=("yes",))  # and harm nobody


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    grammars = Grammars(tmp_path, 100, (1,))
    with pytest.raises(InvalidField, match="structured_outputs: not available for this model"):
        make(grammars, choice=("yes",))
    assert make(grammars, bad_words=((3,),)) is not None
    grammars.close()


def test_the_same_grammar_serves_sequences_apart(grammars, tokenizer, vocab_size):
    first, second = (make(grammars, regex="ab{5}c") for _ in range(2))
    start = first([5, 6])
    a = tokenizer.encode("a", add_special_tokens=False)[-1:]
    after = first([5, 6, *a])
    assert after != start
    assert second([5, 6]) == start and second([5, 6, *a]) == after


def test_a_token_against_the_grammar_sets_the_error(grammars, tokenizer, vocab_size):
    constraint = make(grammars, regex="[0-9]{3}")
    constraint([5, 6])
    wrong = tokenizer.encode("x", add_special_tokens=False)[-1]
    mask = constraint([5, 6, wrong])
    assert constraint.error is not None and constraint.error.startswith("structured_outputs: ")
    assert allowed(mask) == sorted({tokenizer.eos_token_id, vocab_size - 1})


def test_after_an_ignored_end_only_ends_follow(grammars, tokenizer, vocab_size):
    digit = tokenizer.encode("7", add_special_tokens=False)[-1]
    ends = sorted({tokenizer.eos_token_id, vocab_size - 1})
    for end in ends:
        constraint = make(grammars, regex="[0-9]+")
        assert set(ends) < set(allowed(constraint([5, 6, digit])))
        assert allowed(constraint([5, 6, digit, end])) == ends
        assert allowed(constraint([5, 6, digit, end, end])) == ends
        assert constraint.error is None


def test_nothing_asked_is_no_constraint(grammars):
    assert make(grammars) is None


def test_single_bad_words_are_never_allowed(grammars, vocab_size):
    constraint = make(grammars, bad_words=((7,), (9,), (vocab_size - 2,)))
    mask = constraint([5, 6])
    assert set(range(vocab_size)) - set(allowed(mask)) == {7, 9, vocab_size - 2}
    assert max(allowed(mask)) == vocab_size - 1


def test_bad_words_that_leave_nothing_fail_the_sequence_alone(tokenizer_dir, vocab_size):
    endless = Grammars(tokenizer_dir, vocab_size, ())
    constraint = make(endless, bad_words=tuple((id,) for id in range(vocab_size)))
    endless.close()
    assert constraint([5, 6]) is None
    assert constraint.error is not None and "bad_words" in constraint.error


def test_long_bad_words_are_stopped_at_their_last_token(grammars, vocab_size):
    constraint = make(grammars, bad_words=((7, 8), (7, 8, 9)), prompt=(5, 7))
    everything = set(range(vocab_size))
    assert constraint([5, 7]) is None  # the 7 is the prompt's
    assert everything - set(allowed(constraint([5, 7, 7]))) == {8}
    assert constraint([5, 7, 7, 6]) is None
    assert everything - set(allowed(constraint([5, 7, 7, 6, 7, 8]))) == {9}


def test_bad_words_and_grammar_together(grammars, tokenizer, vocab_size):
    yes = tokenizer.bad_words(["y", "yes", "ye"])
    constraint = make(grammars, bad_words=yes, choice=("yes", "no"))
    assert walk(constraint, tokenizer, vocab_size, 1) == "no"
    # A way on that bad words close is an end, never an empty mask.
    closed = make(grammars, bad_words=yes, choice=("yes",))
    assert walk(closed, tokenizer, vocab_size, 1) == ""
