"""Masks: what a grammar and bad words allow next, and what happens when they cannot be followed."""

from __future__ import annotations

import json
import random
import re
import shutil
from concurrent.futures import Future

import pytest
from byte_vocabulary import END, TOOL, accepts
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Inner

from gllm_engine.sampling import InvalidField, SamplingParams, StructuredOutputs
from gllm_engine.text import constraints
from gllm_engine.text.constraints import Constraint, Grammars
from gllm_engine.text.tokenizer import Tokenizer
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


@pytest.fixture(scope="module")
def added(tokenizer_dir, tmp_path_factory):
    """Grammars and tokenizer of a model with tokens for thinking and calls, and a normalizer."""
    directory = tmp_path_factory.mktemp("added") / "tokenizer"
    shutil.copytree(tokenizer_dir, directory)
    inner = Inner.from_file(str(directory / "tokenizer.json"))
    inner.add_tokens([AddedToken("<think>", normalized=False)])
    inner.add_special_tokens(["<call>"])
    old = [] if inner.normalizer is None else [inner.normalizer]
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), *old])
    inner.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer(directory)
    vocab_size = tokenizer.vocab_size + PADDING
    made = Grammars(directory, vocab_size, (tokenizer.eos_token_id, vocab_size - 1))
    yield made, tokenizer, vocab_size
    made.close()


def make(grammars, bad_words=(), prompt=(5, 6), ids=(), **asked) -> Constraint:
    structured = StructuredOutputs(**asked) if asked else None
    sampling = SamplingParams(structured_outputs=structured, allowed_token_ids=ids)
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


# An added token, a special one, the end itself, and a text that the normalizer would change.
@pytest.mark.parametrize("word", ["<think>", "<call>", "</s>", "e\u0301"])
@pytest.mark.parametrize("kind", ["regex", "choice", "lark", "gbnf", "key", "enum", "const"])
def test_any_literal_can_be_spelled(added, kind, word):
    grammars, tokenizer, vocab_size = added
    key = {"properties": {word: {"type": "null"}}, "required": [word]}
    key |= {"type": "object", "additionalProperties": False}
    asked, texts = {
        "regex": ({"regex": f"{word}[ab]{word}(yes|no)"}, f"{word}[ab]{word}(yes|no)"),
        "choice": ({"choice": (word, f"{word}!")}, f"{word}!?"),
        "lark": ({"grammar": f'start: "{word}" ("a" | "b")'}, f"{word}[ab]"),
        "gbnf": ({"grammar": f'root ::= "{word}a" | "(" root ")"'}, rf"\(*{word}a\)*"),
        "key": ({"json": json.dumps(key)}, rf'{{\s*"{word}"\s*:.*}}'),
        "enum": ({"json": json.dumps({"enum": [word, f"{word} b"]})}, f'"{word}( b)?"'),
        "const": ({"json": json.dumps({"const": word})}, f'"{word}"'),
    }[kind]
    for seed in range(4):
        text = walk(make(grammars, **asked), tokenizer, vocab_size, seed)
        assert re.fullmatch(texts, text), text


def test_an_added_token_may_spell_itself_and_a_special_one_may_not(added):
    grammars, tokenizer, _ = added
    ids = {word: tokenizer.encode(word, False)[-1] for word in ("<think>", "<call>", "</s>")}
    for word, id in ids.items():
        assert (id in allowed(make(grammars, choice=(word,))([5, 6]))) == (word == "<think>")
    # In Lark any of them can be named.
    for word, id in ids.items():
        constraint = make(grammars, grammar=f'start: "<x>" /<y>/ {word} // {word}')
        tokens = [5, 6]
        while id not in (ways := allowed(constraint(tokens))):
            tokens.append(ways[0])
        assert ways == [id]


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
        ({"grammar": "root ::= a"}, "the GBNF grammar is not usable (rule root uses a"),
        ({"grammar": "root ::= root"}, "allows no text at all"),
        ({"json_object": True, "whitespace_pattern": "["}, "unclosed character class"),
        ({"json": '{"x-guidance": 1}'}, "x-guidance in the schema is not an object"),
        ({"structural_tag": "{}"}, "structural_tag is not JSON with structures and triggers"),
        ({"structural_tag": '{"type": "structural_tag", "format": {}}'}, "unknown field `format`"),
        ({"structural_tag": '{"structures": [], "triggers": []}'}, "has no structures"),
        (
            {"structural_tag": '{"structures": [{"begin": "a", "end": ""}], "triggers": ["b"]}'},
            "no trigger is a beginning of 'a'",
        ),
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
    assert constraint([5, 6, wrong]) is None
    assert constraint.error is not None and constraint.error.startswith("structured_outputs: ")


def test_a_mask_that_takes_too_long_fails_the_sequence(grammars, monkeypatch):
    monkeypatch.setattr(constraints, "MAX_MASK_S", -1.0)
    constraint = make(grammars, regex="[0-9]{3}")
    assert constraint([5, 6]) is None
    assert constraint.error == (
        "structured_outputs: the grammar is too complex to be followed further "
        "(one token took more than -1 s)"
    )


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


def test_the_tokenizers_end_token_is_enough(tokenizer_dir, tokenizer, vocab_size):
    made = Grammars(tokenizer_dir, vocab_size, ())
    try:
        assert made.eos_token_ids == (tokenizer.eos_token_id,)
        constraint = make(made, choice=("yes",))
        tokens = [5, 6]
        while (ids := allowed(constraint(tokens))) != [tokenizer.eos_token_id]:
            tokens.append(ids[0])
        assert tokenizer.decode([5, 6, *tokens[2:]]).endswith("yes") and len(tokens) <= 5
    finally:
        made.close()


def test_bad_words_that_leave_nothing_fail_the_sequence_alone(vocab_size):
    everything = [(id,) for id in range(vocab_size)]
    constraint = Constraint(vocab_size, (), 2, None, everything)
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
    # A way on that bad words close is an error, not an end.
    ways = allowed(make(grammars, choice=("yes",))([5, 6]))
    closed = make(grammars, bad_words=tuple((id,) for id in ways), choice=("yes",))
    assert closed([5, 6]) is None
    assert closed.error == "bad_words: they forbid all that the grammar allows here"


def test_only_allowed_token_ids_may_come(grammars, vocab_size):
    ids = (3, 17, vocab_size - 1)
    constraint = make(grammars, ids=ids)
    assert allowed(constraint([5, 6])) == allowed(constraint([5, 6, 17])) == list(ids)
    assert allowed(make(grammars, ids=ids, bad_words=((17,),))([5, 6])) == [3, vocab_size - 1]
    nothing = make(grammars, ids=(3,), bad_words=((3,),))
    assert nothing([5, 6]) is None
    assert nothing.error == (
        "allowed_token_ids: they, or they and bad_words together, forbid every token"
    )


def test_allowed_token_ids_and_grammar_together(grammars, tokenizer, vocab_size):
    ends = {tokenizer.eos_token_id, vocab_size - 1}
    ways = allowed(make(grammars, regex="[bc]")([5, 6]))
    others = tuple({*range(50)} - {*ways} - ends)
    constraint = make(grammars, ids=(*others, ways[0]), regex="[bc]")
    assert allowed(constraint([5, 6])) == ways[:1]
    assert set(allowed(constraint([5, 6, ways[0]]))) == ends  # the grammar's end needs no leave
    closed = make(grammars, ids=others, regex="[bc]")
    assert closed([5, 6]) is None and closed.error.endswith(
        "forbid all that the grammar allows here"
    )


def test_a_complete_text_ends_even_if_its_end_is_a_bad_word(grammars, tokenizer, vocab_size):
    ends = (tokenizer.eos_token_id, vocab_size - 1)
    constraint = make(grammars, bad_words=tuple((id,) for id in ends), regex="[ab]")
    a = tokenizer.encode("a", add_special_tokens=False)[-1]
    assert not set(ends) & set(allowed(constraint([5, 6])))
    assert set(allowed(constraint([5, 6, a]))) == set(ends)


@pytest.mark.parametrize(
    ("regex", "matching", "others"),
    [
        (r"\d[\d]\D", ["12x", "12٣"], ["٣2x", "1٣x", "123"]),
        (r"\w+", ["a_Z9"], ["é", "日", "-"]),
        (r"\W\S", ["éé", "-a"], ["aa", "- "]),
        (r"\s", [" ", "\n", "\t"], ["\u00a0", "a"]),
        (r"^a/b$", ["a/b"], ["a"]),
    ],
)
def test_classes_of_a_regex_are_ascii(regex, matching, others):
    assert all(accepts(text, regex=regex) for text in matching)
    assert not any(accepts(text, regex=regex) for text in others)


def test_any_json_object():
    assert accepts('{"a": [1, {}],\n "b": null}', json_object=True)
    assert not any(accepts(text, json_object=True) for text in ("[]", "1", "{", '"a"'))


def test_white_space_of_json():
    spaced, dense = '{ "a":1}', '{"a":1}'
    assert accepts(spaced, json_object=True) and accepts(dense, json_object=True)
    assert not accepts(spaced, json_object=True, disable_any_whitespace=True)
    assert accepts(dense, json='{"type": "object"}', disable_any_whitespace=True)
    assert not accepts(spaced, json="{}", whitespace_pattern="_?")
    assert accepts('{_"a"_:1_}', json="{}", whitespace_pattern="_?")


def test_a_structural_tag_begins_at_its_trigger():
    structures = [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": None, "end": "!"},
    ]
    tag = json.dumps({"type": "structural_tag", "structures": structures, "triggers": ["<f="]})
    for text in ("", "no call", "a <f=a>12</f> and <f=b>[null]! then", "<f"):
        assert accepts(text, structural_tag=tag)
    for text in ("<f=a>x</f>", "<f=c>1</f>", "<f=a>1"):
        assert not accepts(text, structural_tag=tag)
    # A special token is no text, so it is named; and it is not the end.
    structures[0]["begin"] = "<tool>"
    tag = json.dumps({"structures": structures[:1], "triggers": ["<tool>"]})
    assert accepts([*b"so ", TOOL, *b"12</f>"], structural_tag=tag)
    assert not accepts([TOOL, *b"x"], structural_tag=tag) and TOOL != END
