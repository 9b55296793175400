"""GBNF: the grammars that people have, the same texts as character by character, and mistakes."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from byte_vocabulary import accepts, sample

from gllm_engine.text.gbnf import GbnfError, gbnf_to_lark, is_gbnf

# What a term takes of white space may include the line's end, yet the line must have one.
SUMS = r"""
root  ::= (sum "=" ws term "\n")+   # one a line
sum   ::= term ([-+*/] term)*
term  ::= name | num | "(" ws sum ")" ws
name  ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
    string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F]
    | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4})   # escapes
  )* "\"" ws
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,2})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
SQL = """
    root ::= select-statement
    select-statement ::= "SELECT " column " from " table " where " condition
    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
    condition ::= column "= " number
    number ::= "1 " | "2 "
"""


@pytest.mark.parametrize(
    ("grammar", "texts", "others"),
    [
        (SUMS, ["a=b\n", "a = b\n\n", "(a+12) *c_1=3 \nx=y\n"], ["a=b", "a+=b\n", "A=b\n"]),
        (JSON, ['{"a": [1, -2.5e3, "x\\"é\\u00e9", true, null, {}]}', "{}"], ["[1]", '{"a"}']),
        (SQL, ["SELECT col_1  from table_2  where col_2 = 1 "], ["SELECT col_1 from table_2"]),
    ],
)
def test_grammars_that_people_have(grammar, texts, others):
    assert is_gbnf(grammar)
    assert all(accepts(text, grammar=grammar) for text in texts)
    assert not any(accepts(text, grammar=grammar) for text in others)


@pytest.mark.parametrize("seed", range(5))
def test_json_made_by_a_grammar_is_json(seed):
    text = sample(seed, grammar=JSON)
    assert text is None or isinstance(json.loads(text), dict)


# Longest lexemes would lose texts of all these, or never end.
@pytest.mark.parametrize(
    ("grammar", "regex"),
    [
        ('root ::= [ab]+ "b"', "[ab]+b"),
        ('root ::= "a"* "aab"', "a*aab"),
        ('root ::= word "b"\nword ::= [ab]*', "[ab]*b"),
        ('root ::= "a"* "aab" | "(" root ")"', r"\(*a*aab\)*"),
        ('root ::= ("a" | "ab") ("b" | "bba") | "(" root ")"', r"\(*(a|ab)(b|bba)\)*"),
        ('root ::= "ab" word | word | "(" root ")"\nword ::= [a-c] [a-c]*', r"\(*[abc]+\)*"),
        ('root ::= x{2} y{,2} | "(" root ")"\nx ::= "a" | ""\ny ::= "b"{1,}', r"\(*a{0,2}b*\)*"),
        ("root ::= .*", "(?s:.*)"),
    ],
)
def test_texts_are_those_of_the_grammar_character_by_character(grammar, regex):
    for length in range(5):
        for letters in itertools.product("ab()", repeat=length):
            text = "".join(letters)
            balanced = text.count("(") == text.count(")") or '"("' not in grammar
            expected = bool(re.fullmatch(regex, text)) and balanced
            assert accepts(text, grammar=grammar) == expected, text


def test_a_long_repetition_takes_in_the_literal_that_follows():
    grammar = 'root ::= [a-z ]* "end" | "<" root ">"'
    for text in ("end", "an end", "end end", "<the end>"):
        assert accepts(text, grammar=grammar)
    assert not accepts("<the end", grammar=grammar)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (r'"\x0b\u00e9\U0001F642\t\\\"/"', '\x0bé🙂\t\\"/'),
        (r"[\]\[\-^&~/] [a\-z] [-a] [a-]", "]-a-"),
        (r"[^\]\\] [\x41-\x43] [à-ü]", "[Bé"),
        ('# a comment\n "a" # "b"\n\n | "c"', "c"),
        ('"a"|', ""),
        ('("a" ("b" | "c")?){2,3}', "abaac"),
        ('".[x]#|"', ".[x]#|"),
    ],
)
def test_spellings(body, text):
    assert accepts(text, grammar=f"root ::= {body}\n")
    assert not accepts(text + "!", grammar=f"root ::= {body}\n")


@pytest.mark.parametrize(
    ("grammar", "sentence"),
    [
        ('top ::= "a"', "no rule named root"),
        ("root ::= a\nb ::= root", "rule root uses a, which is not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2: rule root is defined twice"),
        ('root ::= "a\nb ::= "c"', "line 1: cannot read '\"a"),
        ('root ::= ("a"\nb ::= "c")', "line 1: a '(' is never closed"),
        ('root ::=\n "a")', "line 2: nothing is open for this ')'"),
        ('root ::= | * "a"', "line 1: '*' has nothing to repeat"),
        ('root ::= "a"{3,1}', "line 1: {3,1} ends before it begins"),
        ('root ::= "a"{,}', "line 1: {,} says no number"),
        ("root ::= [z-a]", "line 1: a range of [z-a] ends before it begins"),
        ("root ::= []", "line 1: the set [] is empty"),
        (r'root ::= "\q"', r"line 1: unknown escape '\\q'"),
        (r'root ::= "\ud800"', r"line 1: \ud800 is no character"),
        (r'root ::= "\U00110000"', "is no character"),
        ("root ::= <tool>", "line 1: cannot read '<tool>'"),
        ('a root ::= "a"', "line 1: expected `name ::=`, got 'a'"),
        ("root ::= " + "(" * 101, "line 1: more than 100 parentheses are open"),
    ],
)
def test_mistakes_get_a_sentence(grammar, sentence):
    with pytest.raises(GbnfError, match=re.escape(sentence)):
        gbnf_to_lark(grammar)


def test_lark_is_told_from_gbnf():
    assert not is_gbnf('start: "a ::= b"\n// x ::= y\nb: "c"')
    assert not is_gbnf("\n" * 100_000) and is_gbnf("# GBNF\n\n  root\t::=[a]")
