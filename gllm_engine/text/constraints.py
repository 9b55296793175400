"""Which tokens may come next: structured outputs (through llguidance) and bad words, as bit masks.

Owns the compiled grammars. Knows nothing of the scheduler; it calls a Constraint with the known
tokens of its sequence whenever it plans the next one. Nothing here raises while a sequence runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from gllm_engine.sampling import InvalidField, StructuredOutputs
from gllm_engine.text.tokenizer import TextError, Tokenizer
from gllm_engine.types import Request

FIELD = "structured_outputs"
MAX_CACHED_GRAMMARS = 64
MAX_ERROR_LEN = 200
# Between the tokens of JSON: what pretty printing needs, but an end. JSON itself sets none, and
# small models then write blanks until max_tokens.
JSON_WHITESPACE = r"\n?[ \t]{0,16}"


class Constraint:
    """The mask of allowed next tokens of one sequence, given all its known tokens.

    Known tokens only ever grow; a second call with the same ones (after a preemption) gives the
    same mask. A mask has one bit a token id, least significant bit first, (vocab_size + 7) // 8
    bytes, and never forbids everything: where bad words leave a grammar no way on, the sequence
    may end. `error`: once set, the sequence cannot be continued as asked and must be failed.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        prompt_len: int,
        matcher: LLMatcher | None,
        bad_words: Sequence[tuple[int, ...]],
    ) -> None:
        self._mask_len = (vocab_size + 7) // 8
        self._all = ((1 << vocab_size) - 1).to_bytes(self._mask_len, "little")
        self._eos = tuple(eos_token_ids)
        self._prompt_len = prompt_len
        self._matcher = matcher
        self._banned = [words[0] for words in bad_words if len(words) == 1]
        self._phrases = [(list(words[:-1]), words[-1]) for words in bad_words if len(words) > 1]
        self._known = prompt_len  # tokens the matcher has seen
        self._ended = False  # an end token is out, yet the sequence goes on (ignore_eos)
        self._masked: int | None = None  # len(tokens) that `_mask` is for
        self._mask: bytes | None = None
        self.error: str | None = None

    def __call__(self, tokens: list[int]) -> bytes | None:
        if self._masked != len(tokens):
            self._mask = self._make(tokens)
            self._masked = len(tokens)
        return self._mask

    def _make(self, tokens: list[int]) -> bytes | None:
        banned = self._banned + self._completing(tokens)
        if self._matcher is None and not banned:
            return None
        mask = bytearray(self._all if self._matcher is None else self._grammatical(tokens))
        for id in banned:
            mask[id >> 3] &= ~(1 << (id & 7))
        if not any(mask):
            self._allow_end(mask)
        if not any(mask):
            self.error = "bad_words: they forbid every token, and this model has none that ends"
            return None
        return bytes(mask)

    def _completing(self, tokens: list[int]) -> list[int]:
        """Tokens that would complete a bad word of several tokens, all of them output."""
        room = len(tokens) - self._prompt_len
        return [
            last
            for head, last in self._phrases
            if len(head) <= room and tokens[len(tokens) - len(head) :] == head
        ]

    def _grammatical(self, tokens: list[int]) -> bytearray:
        """What the grammar allows after `tokens`; the end alone once it has failed."""
        matcher = self._matcher
        assert matcher is not None
        for token in tokens[self._known :]:
            self._ended = self._ended or token in self._eos
            if not self._ended:
                matcher.consume_token(token)
        self._known = len(tokens)
        bits = b"" if self._ended else matcher.compute_bitmask()[: self._mask_len]
        if matcher.is_error():
            self.error = f"{FIELD}: the grammar cannot be followed further ({_reason(matcher)})"
            bits = b""
        mask = bytearray(bits.ljust(self._mask_len, b"\0"))
        if self._ended or matcher.is_error() or matcher.is_accepting():
            self._allow_end(mask)
        return mask

    def _allow_end(self, mask: bytearray) -> None:
        for id in self._eos:
            mask[id >> 3] |= 1 << (id & 7)


class Grammars:
    """Compiles the constraints of requests, on a thread of its own.

    A grammar may take a second to compile and a tokenizer to load; sequences that run meanwhile
    must not wait. Compiled grammars are kept, since most users send the same schema again.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`tokenizer`: its directory. `vocab_size`: the model's, which may be padded."""
        self._vocab_size, self._eos = vocab_size, eos_token_ids
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizer = self._thread.submit(_load, tokenizer, vocab_size, eos_token_ids)
        self._compiled = lru_cache(MAX_CACHED_GRAMMARS)(self._compile)

    def constrain(self, request: Request) -> Constraint | Future[Constraint] | None:
        """What restricts this request, if anything; a Future when there is a grammar.

        The future raises InvalidField for one that cannot be compiled.
        """
        asked = request.sampling.structured_outputs
        if asked is not None:
            return self._thread.submit(lambda: self._build(request, self._compiled(asked)))
        return self._build(request, None) if request.bad_words else None

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _build(self, request: Request, matcher: LLMatcher | None) -> Constraint:
        own = None if matcher is None else matcher.deep_copy()
        return Constraint(self._vocab_size, self._eos, len(request.prompt), own, request.bad_words)

    def _compile(self, asked: StructuredOutputs) -> LLMatcher:
        """A matcher at the beginning of the grammar; to be copied, never advanced."""
        tokenizer = self._tokenizer.result()
        if isinstance(tokenizer, str):
            raise InvalidField(FIELD, tokenizer)
        matcher = LLMatcher(
            tokenizer, _grammar(asked), log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        if matcher.is_error():
            raise InvalidField(FIELD, f"the grammar is not usable ({_reason(matcher)})")
        if not any(matcher.compute_bitmask()):
            raise InvalidField(FIELD, "the grammar allows no text at all")
        return matcher


def _load(directory: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer | str:
    """The tokenizer as llguidance needs it, or why there is none."""
    try:
        tokenizer = Tokenizer(directory)
    except TextError as error:
        return f"not available for this model ({error})"
    if not eos_token_ids or tokenizer.eos_token_id is None:
        return "not available for this model, which has no end-of-sequence token"
    # An end token that the tokenizer lacks still ends: Constraint sets its bit itself.
    eos = [id for id in eos_token_ids if id < tokenizer.vocab_size] or [tokenizer.eos_token_id]
    n_vocab = max(vocab_size, tokenizer.vocab_size)
    try:
        return LLTokenizer(tokenizer.to_json(), n_vocab=n_vocab, eos_token=eos)
    except ValueError as error:
        return f"not available for this model's tokenizer ({_shorten(str(error))})"


def _grammar(asked: StructuredOutputs) -> str:
    if asked.json is not None:
        try:
            schema = json.loads(asked.json)
        except (ValueError, RecursionError) as error:
            raise InvalidField(FIELD, f"json is not JSON ({error})") from None
        # A schema that is no object has no place for them: true, false, or a mistake.
        defaults = {"whitespace_pattern": JSON_WHITESPACE} if isinstance(schema, dict) else None
        return LLMatcher.grammar_from_json_schema(asked.json, defaults=defaults)
    if asked.regex is not None:
        return LLMatcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        choices = " | ".join(json.dumps(choice) for choice in asked.choice)
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    assert asked.grammar is not None  # SamplingParams takes care of "exactly one"
    return LLMatcher.grammar_from_lark(asked.grammar)


def _reason(matcher: LLMatcher) -> str:
    return _shorten(matcher.get_error() or matcher.stop_reason())


def _shorten(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MAX_ERROR_LEN else line[: MAX_ERROR_LEN - 3] + "..."
