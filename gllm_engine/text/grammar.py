"""Translates a user's structured_outputs to a grammar of llguidance, and compiles the grammar.

Owns the grammar dialects. Compiling a hostile grammar may take any time and memory, and may even
end the process. So grammar_trial.py first compiles every grammar in a process of its own. Knows
nothing of sequences.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NoReturn

import msgspec
from llguidance import (
    LLMatcher,
    LLParserLimits,
    LLTokenizer,
    StructTag,
    TokenizerWrapper,
    regex_to_lark,
)

from gllm_engine.sampling import StructuredOutputs
from gllm_engine.text.gbnf import GbnfError, gbnf_to_lark, is_gbnf

MAX_ERROR_LEN = 200
# States of a lexer, about 2 KB each; a sequence may have a lexer of its own.
MAX_LEXER_STATES = 50_000
# Between the tokens of JSON: enough for pretty printing, but bounded. JSON itself sets no bound,
# and small models then write blanks until max_tokens.
JSON_WHITESPACE = r"\n?[ \t]{0,16}"
ANY_OBJECT = '{"type": "object"}'
# In a regex, \d, \w and \s match ASCII only, as in patterns of JSON schemas and in xgrammar.
ASCII_CLASSES = "dws"
# If a grammar allows only one text, the model still chooses its tokens. Else llguidance would call
# the tokenizer, whose tokens may spell another text: with a special token, or normalized.
UNFORCED = {"name": "unforced", "lark_grammar": '%llguidance {"no_forcing": true}\nstart: ""'}
# Matches Lark's strings, comments and regular expressions; group 1 is a token's name outside them.
_LARK = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|#[^\n]*|/(?:[^/\\\n]|\\.)+/|(<[^\s<>"]+>)')


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says why."""


class Vocabulary(msgspec.Struct, frozen=True):
    """The detokenizer's bytes of every token id; b"" for an id without a token."""

    tokens: list[bytes]
    special: list[int]  # never part of a text: the special tokens, including all end tokens
    ends: list[int]


class _Structure(msgspec.Struct, forbid_unknown_fields=True):
    begin: str
    end: str
    schema: dict[str, Any] | bool | None = None


class _StructuralTag(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's and xgrammar's JSON format: free text in which a trigger starts a structure."""

    structures: list[_Structure]
    triggers: list[str]
    type: Literal["structural_tag"] = "structural_tag"


class _Tokens:
    """A vocabulary with the attributes that llguidance reads."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special
        self.eos_token_id = vocabulary.ends[0]

    def __call__(self, text: str) -> NoReturn:
        raise NotImplementedError("grammars are unforced, so no text is to be tokenized")


def ll_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)), eos_token=vocabulary.ends)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar of `translate`; returns a matcher at its start. Raises GrammarError."""
    limits = LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(f"the grammar is not usable ({reason(matcher)})")
    matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(f"the grammar allows no text at all ({reason(matcher)})")
    return matcher


def reason(matcher: LLMatcher) -> str:
    """The reason why a matcher has failed, for an error message."""
    message = matcher.get_error().removesuffix("<non-verbose/>").strip()
    if message == "NoExtensionBias":
        return "no token can follow"
    return shorten(message or matcher.stop_reason())


def shorten(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MAX_ERROR_LEN else line[: MAX_ERROR_LEN - 3] + "..."


def translate(asked: StructuredOutputs, vocabulary: Vocabulary) -> str:
    """Translate structured_outputs to llguidance's JSON. Raises GrammarError."""
    try:
        grammar = _translate(asked, vocabulary)
    except GbnfError as error:
        raise GrammarError(f"the GBNF grammar is not usable ({error})") from None
    except RecursionError:
        raise GrammarError("the grammar is nested too deeply") from None
    return json.dumps({"grammars": [grammar, UNFORCED]})


def _translate(asked: StructuredOutputs, vocabulary: Vocabulary) -> dict[str, Any]:
    if asked.json is not None or asked.json_object:
        return {"json_schema": _schema(asked)}
    if asked.regex is not None:
        lark = f"start: /{regex_to_lark(asked.regex, ASCII_CLASSES)}/"
    elif asked.choice is not None:
        lark = "start: " + " | ".join(json.dumps(choice) for choice in asked.choice)
    elif asked.structural_tag is not None:
        lark = _name_tokens(_structural_tag(asked.structural_tag, vocabulary), vocabulary)
    else:
        assert asked.grammar is not None  # SamplingParams takes care of "exactly one"
        if is_gbnf(asked.grammar):
            lark = gbnf_to_lark(asked.grammar)
        else:
            lark = _name_tokens(asked.grammar, vocabulary)
    return {"lark_grammar": lark}


def _schema(asked: StructuredOutputs) -> Any:
    try:
        schema = json.loads(ANY_OBJECT if asked.json is None else asked.json)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"json is not JSON ({error})") from None
    if asked.disable_any_whitespace:
        return _with_options(schema, {}, {"whitespace_flexible": False})
    if asked.whitespace_pattern is not None:
        return _with_options(schema, {}, {"whitespace_pattern": asked.whitespace_pattern})
    return _with_options(schema, {"whitespace_pattern": JSON_WHITESPACE}, {})


def _with_options(schema: Any, defaults: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """The schema with llguidance's JSON options added.

    A schema that is not an object is returned unchanged: true, false, or an invalid value that
    llguidance refuses.
    """
    if not isinstance(schema, dict):
        return schema
    own = schema.get("x-guidance", {})
    if not isinstance(own, dict):
        raise GrammarError("x-guidance in the schema is not an object")
    return schema | {"x-guidance": defaults | own | overrides}


def _structural_tag(text: str, vocabulary: Vocabulary) -> str:
    try:
        asked = msgspec.json.decode(text, type=_StructuralTag)
    except (msgspec.DecodeError, RecursionError) as error:
        problem = "is not JSON with structures and triggers, the one form that is supported"
        raise GrammarError(f"structural_tag {problem} ({error})") from None
    if not asked.structures:
        raise GrammarError("structural_tag has no structures")
    names = {vocabulary.tokens[id] for id in vocabulary.special}
    tags = []
    is_token = False
    for structure in asked.structures:
        triggers = [text for text in asked.triggers if text and structure.begin.startswith(text)]
        if not triggers:
            begin = shorten(repr(structure.begin))
            raise GrammarError(f"structural_tag: no trigger is a beginning of {begin}")
        trigger = max(triggers, key=len)
        is_token = is_token or trigger.encode() in names
        schema = True if structure.schema is None else structure.schema
        grammar = _with_options(schema, {"whitespace_pattern": JSON_WHITESPACE}, {})
        grammar = grammar if isinstance(grammar, dict) else {"anyOf": [grammar]}
        tags.append(
            StructTag(trigger=trigger, begin=structure.begin, grammar=grammar, end=structure.end)
        )
    return StructTag.to_grammar(tags, assume_special=is_token)


def _name_tokens(lark: str, vocabulary: Vocabulary) -> str:
    """Replace names of added tokens that are not special (such as <think>) by their token ids.

    llguidance knows only the names of special tokens.
    """
    special = set(vocabulary.special)

    def number(match: re.Match[str]) -> str:
        name = match[1]
        id = None if name is None else ids.get(name.encode())
        return match[0] if id is None else f"<[{id}]>"

    ids = {
        token: id
        for id, token in enumerate(vocabulary.tokens)
        if token[:1] == b"<" and token[-1:] == b">" and id not in special
    }
    return _LARK.sub(number, lark)
