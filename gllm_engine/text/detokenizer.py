"""An incremental detokenizer: turns token ids into text as they arrive.

Owns the bytes of every token, and the handling of partial characters and of a text's first token.
Knows nothing of encoding, chat or requests.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Container, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


class DecoderError(ValueError):
    """The decoder type of a tokenizer.json is not supported; the message names the type."""


class Spelling:
    """The bytes of every token, made by the decoder's rules. Immutable except for caches."""

    def __init__(self, tokenizer: Tokenizer, special_tokens: Container[str] = ()) -> None:
        """`special_tokens`: tokens to skip beside those of the library. Raises DecoderError."""
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        # The pickled state is the decoder's part of tokenizer.json. Writing the whole tokenizer
        # would take a second.
        rules = _decoder_rules(None if decoder is None else json.loads(decoder.__getstate__()))
        # Spaces that the decoder strips from the start of a text.
        self.leading_spaces = sum(rule["start"] for rule in rules if rule["type"] == "Strip")
        self.special_ids = _special_ids(tokenizer, special_tokens)
        self._spell = _speller(rules, first=False)
        self._spell_first = _speller(rules, first=True)
        self._shown = _Pieces(lambda id: self._piece(self._spell, id))
        self._plain = _Pieces(lambda id: b"" if id in self.special_ids else self._shown[id])

    def pieces(self, skip_special_tokens: bool) -> dict[int, bytes]:
        """UTF-8 bytes by token id, filled on demand. A sequence's pieces joined are its text.

        b"" for a skipped special token, and for an id without a token.
        """
        return self._plain if skip_special_tokens else self._shown

    def first_piece(self, id: int) -> bytes:
        """The bytes of a text's first token: some decoders drop its word markers."""
        return self._piece(self._spell_first, id)

    def _piece(self, spell: Callable[[str], bytes], id: int) -> bytes:
        known = 0 <= id < 2**32  # for other ids the library raises OverflowError
        token = self._tokenizer.id_to_token(id) if known else None
        return b"" if token is None else spell(token)


class Detokenizer:
    """Turns the output tokens after a prompt into text, incrementally.

    The returned texts add up to decode(prompt + output) without its prefix decode(prompt). An
    incomplete character is held back. Cost: one table look-up for each token, and the UTF-8
    decoding of the new bytes.
    """

    __slots__ = ("_begun", "_leading", "_pieces", "_spelling", "_split", "_utf8")

    def __init__(
        self, spelling: Spelling, prompt_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._spelling = spelling
        self._pieces = spelling.pieces(skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for id in reversed(prompt_ids):
            tail = self._pieces[id] + tail
            if len(tail) >= 3:  # an incomplete character has at most three bytes
                break
        self._utf8.decode(tail[-3:])
        # The prompt may end inside a character. If the output does not complete that character,
        # its replacement characters belong to the prompt's text.
        self._split = len(self._utf8.getstate()[0].decode("utf-8", "replace"))
        self._begun = tail != b""  # whether a token has begun the text
        self._leading = 0 if self._begun else spelling.leading_spaces

    def feed(self, ids: Sequence[int]) -> str:
        """The new text after adding `ids`; an incomplete character at the end is held back."""
        pieces = map(self._pieces.__getitem__, ids)
        data = b"".join(pieces) if self._begun else self._begin(ids)
        return self._trim(self._utf8.decode(data))

    def flush(self) -> str:
        """The rest of the text: a replacement character if it ends inside a character, else ""."""
        return self._trim(self._utf8.decode(b"", True))

    def _begin(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids` while the text is empty; its first token is spelled differently."""
        for index, id in enumerate(ids):
            if self._pieces[id]:
                self._begun = True
                later = map(self._pieces.__getitem__, ids[index + 1 :])
                return self._spelling.first_piece(id) + b"".join(later)
        return b""

    def _trim(self, text: str) -> str:
        if self._split and text:
            begun = len(text) - len(text.lstrip("\ufffd"))
            text = text[min(begun, self._split) :]
            self._split = 0
        while self._leading and text:
            if text[0] != " ":
                self._leading = 0
                break
            text = text[1:]
            self._leading -= 1
        return text


class _Pieces(dict[int, bytes]):
    """A table that is filled on demand, so a front end's start does not spell 150,000 tokens."""

    def __init__(self, spell: Callable[[int], bytes]) -> None:
        self._spell = spell

    def __missing__(self, id: int) -> bytes:
        piece = self[id] = self._spell(id)
        return piece


def _special_ids(tokenizer: Tokenizer, special_tokens: Container[str]) -> frozenset[int]:
    """The ids of the tokens that the library skips, and of `special_tokens`.

    Decoding shows which tokens the library skips. The `special` attribute of an added token does
    not, because it is the value that was set last.
    """

    def is_skipped(id: int) -> bool:
        shown = tokenizer.decode([id], skip_special_tokens=False)
        return bool(shown) and not tokenizer.decode([id], skip_special_tokens=True)

    added = tokenizer.get_added_tokens_decoder().items()
    return frozenset(id for id, token in added if token.content in special_tokens or is_skipped(id))


def _decoder_rules(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's decoder. Every step must work on single tokens."""
    rules = [{"type": None}] if decoder is None else decoder.get("decoders", [decoder])
    for index, rule in enumerate(rules):
        if rule["type"] not in _STEPS:
            known = ", ".join(_STEPS)
            raise DecoderError(f"decoder {rule['type']} is not supported; known are {known}")
        if rule["type"] == "Strip":
            fused = any(earlier["type"] == "Fuse" for earlier in rules[:index])
            if not fused or rule["content"] != " " or rule["stop"]:
                raise DecoderError(
                    "a decoder Strip is supported that comes after Fuse and takes spaces from the "
                    f"left; this one is {rule}"
                )
    return rules


def _speller(rules: list[dict[str, Any]], first: bool) -> Callable[[str], bytes]:
    """A function from a token's spelling in the vocabulary to its UTF-8 bytes.

    `first`: whether it is for the first token of a text.
    """
    steps = [step for rule in rules if (step := _step(rule, first)) is not None]

    def spell(token: str) -> bytes:
        piece: str | bytes = token
        for step in steps:
            if isinstance(piece, str):
                piece = step(piece)
        return piece if isinstance(piece, bytes) else piece.encode()

    return spell


def _step(rule: dict[str, Any], first: bool) -> Callable[[str], str | bytes] | None:
    """What a step of the decoder does to single tokens; None: nothing. `first`: see _speller."""
    match rule["type"]:
        case "ByteLevel":
            return _bytes_of
        case "ByteFallback":
            return lambda token: _BYTE_TOKENS.get(token, token)
        case "Replace":
            pattern = rule["pattern"]
            content = rule["content"]
            if "String" not in pattern:
                raise DecoderError("a decoder that replaces by regular expression is not supported")
            return lambda token: token.replace(pattern["String"], content)
        case "Metaspace":
            # Word markers become spaces. In a text's first token, all word markers are removed.
            dropped = first and rule.get("prepend_scheme", "always") != "never"
            return lambda token: token.replace(rule["replacement"], "" if dropped else " ")
    return None


def _bytes_of(token: str) -> bytes:
    """The bytes of a token in GPT-2's spelling; an added token is spelled in plain characters."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


# GPT-2's spelling of bytes: character -> byte value.
_BYTE_OF: dict[str, int] = {char: value for value, char in bytes_to_unicode().items()}

# Tokens for single bytes -> the bytes.
_BYTE_TOKENS = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}
# The steps of decoders, by "type" in tokenizer.json, that work on single tokens.
_STEPS = ("ByteLevel", "ByteFallback", "Replace", "Metaspace", "Fuse", "Strip")
