"""Token masks for structured outputs (through llguidance), bad words and allowed token ids.

Owns the compiled grammars. The scheduler calls a Constraint with the known tokens of its sequence
whenever it plans the next token. A Constraint never raises; it sets `error`. Knows nothing of the
scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path

from llguidance import LLMatcher

from gllm_engine.sampling import InvalidField, StructuredOutputs
from gllm_engine.text.grammar import GrammarError, Vocabulary, reason
from gllm_engine.text.grammar_trial import Compiler
from gllm_engine.text.tokenizer import TextError, Tokenizer, end_token_ids
from gllm_engine.types import Request

FIELD = "structured_outputs"
MAX_CACHED_GRAMMARS = 64
# Processor time for one mask. All sequences wait for a mask; most take less than 1 ms.
MAX_MASK_S = 0.25


class Constraint:
    """The token mask of one sequence: which tokens may come next, given all its known tokens.

    Known tokens are only ever appended. A second call with the same tokens (after a preemption)
    returns the same mask. A mask has one bit for each token id, least significant bit first,
    (vocab_size + 7) // 8 bytes, and always allows a token. None allows every token. `error`: once
    set, the sequence cannot be continued as requested. The mask of that call is None, and the token
    sampled with it must be dropped.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        prompt_len: int,
        matcher: LLMatcher | None,
        bad_words: Sequence[tuple[int, ...]],
        allowed_ids: Sequence[int] = (),
    ) -> None:
        """`allowed_ids`: the tokens that the request allows; empty: all."""
        self._mask_len = (vocab_size + 7) // 8
        self._is_restricted = bool(allowed_ids)
        if allowed_ids:
            self._permitted = self._mask_of(allowed_ids)
        else:
            self._permitted = ((1 << vocab_size) - 1).to_bytes(self._mask_len, "little")
        self._eos = tuple(eos_token_ids)
        self._prompt_len = prompt_len
        self._matcher = matcher
        self._banned = [words[0] for words in bad_words if len(words) == 1]
        self._phrases = [(list(words[:-1]), words[-1]) for words in bad_words if len(words) > 1]
        self._known = prompt_len  # tokens the matcher has seen
        self._ended = False  # an end token was sampled, but the sequence goes on (ignore_eos)
        self._masked: int | None = None  # len(tokens) of the call that made `_mask`
        self._mask: bytes | None = None
        self.error: str | None = None

    def __call__(self, tokens: list[int]) -> bytes | None:
        if self._masked != len(tokens):
            self._mask = self._make(tokens)
            self._masked = len(tokens)
        return self._mask

    def _make(self, tokens: list[int]) -> bytes | None:
        banned = self._banned + self._completing(tokens)
        if self._matcher is None and not banned and not self._is_restricted:
            return None
        allowed = bytearray(self._permitted) if self._matcher is None else self._grammatical(tokens)
        if self.error is not None:
            return None
        mask = _intersection(allowed, self._permitted) if self._is_restricted else allowed.copy()
        for id in banned:
            mask[id >> 3] &= ~(1 << (id & 7))
        if not any(mask):  # nothing can forbid an end token that the grammar allows
            for id in self._eos:
                mask[id >> 3] |= allowed[id >> 3] & 1 << (id & 7)
        if not any(mask):
            what = "every token" if self._matcher is None else "all that the grammar allows here"
            who = "bad_words: they forbid"
            if self._is_restricted:
                who = "allowed_token_ids: they, or they and bad_words together, forbid"
            self.error = f"{who} {what}"
            return None
        return bytes(mask)

    def _mask_of(self, ids: Sequence[int]) -> bytes:
        mask = bytearray(self._mask_len)
        _allow(mask, ids)
        return bytes(mask)

    def _completing(self, tokens: list[int]) -> list[int]:
        """Tokens that would complete a bad word of several tokens, all of them output tokens."""
        room = len(tokens) - self._prompt_len
        return [
            last
            for head, last in self._phrases
            if len(head) <= room and tokens[len(tokens) - len(head) :] == head
        ]

    def _grammatical(self, tokens: list[int]) -> bytearray:
        """The mask of tokens that the grammar allows after `tokens`; may set `error`."""
        matcher = self._matcher
        assert matcher is not None
        start = time.thread_time()
        for token in tokens[self._known :]:
            self._ended = self._ended or token in self._eos
            if not self._ended:
                matcher.consume_token(token)
        self._known = len(tokens)
        bits = b"" if self._ended else matcher.compute_bitmask()[: self._mask_len]
        if matcher.is_error():
            self.error = f"{FIELD}: the grammar cannot be followed further ({reason(matcher)})"
        elif time.thread_time() - start > MAX_MASK_S:
            took = f"one token took more than {MAX_MASK_S:g} s"
            self.error = f"{FIELD}: the grammar is too complex to be followed further ({took})"
        mask = bytearray(bits.ljust(self._mask_len, b"\0"))
        if self._ended or matcher.is_accepting():
            _allow(mask, self._eos)
        return mask


class Grammars:
    """Compiles the constraints of requests, on a thread of its own.

    Compiling a grammar or loading a tokenizer may take seconds; running sequences must not wait.
    Compiled grammars are cached, because most users send the same schema again. Failures are cached
    too, because the n sequences of a request have the same grammar.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`tokenizer`: the tokenizer's directory. `vocab_size`: of the model, may be padded.

        `eos_token_ids`: from the checkpoint's configuration.
        """
        self._vocab_size = vocab_size
        self._configured_ids = eos_token_ids
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizer = self._thread.submit(_load, tokenizer)
        self._compiler = self._thread.submit(self._make_compiler)
        self._compiled = lru_cache(MAX_CACHED_GRAMMARS)(self._compile)

    def constrain(self, request: Request) -> Constraint | Future[Constraint] | None:
        """The constraint of a request: a Future for a grammar, None if there is no constraint.

        The future raises InvalidField for a grammar that cannot be compiled.
        """
        asked = request.sampling.structured_outputs
        if asked is not None:
            return self._thread.submit(self._constrain, request, asked)
        is_plain = not request.bad_words and not request.sampling.allowed_token_ids
        return None if is_plain else self._build(request, None)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end tokens, of the configuration and of the tokenizer. Waits for the tokenizer."""
        tokenizer = self._tokenizer.result()
        known = None if isinstance(tokenizer, str) else tokenizer
        return end_token_ids(self._configured_ids, known, self._vocab_size)

    def close(self) -> None:
        """Stop the trial process and end the thread.

        Waits only for a loading tokenizer, or for a grammar whose trial has succeeded.
        """
        self._compiler.add_done_callback(_stop)
        self._thread.shutdown(cancel_futures=True)
        if (compiler := _made(self._compiler)) is not None:
            compiler.close()

    def _constrain(self, request: Request, asked: StructuredOutputs) -> Constraint:
        compiled = self._compiled(asked)
        if isinstance(compiled, str):
            raise InvalidField(FIELD, compiled)
        return self._build(request, compiled)

    def _build(self, request: Request, matcher: LLMatcher | None) -> Constraint:
        own = None if matcher is None else matcher.deep_copy()
        return Constraint(
            self._vocab_size,
            self.eos_token_ids,
            len(request.prompt),
            own,
            request.bad_words,
            request.sampling.allowed_token_ids,
        )

    def _compile(self, asked: StructuredOutputs) -> LLMatcher | str:
        """A matcher, or a sentence saying why there is none. Copy the matcher; never advance it."""
        compiler = self._compiler.result()
        if isinstance(compiler, str):
            return compiler
        try:
            return compiler.compile(asked)
        except GrammarError as error:
            return str(error)

    def _make_compiler(self) -> Compiler | str:
        """The compiler of this model's grammars, or a sentence saying why there is none."""
        tokenizer = self._tokenizer.result()
        if isinstance(tokenizer, str):
            return tokenizer
        if not self.eos_token_ids:
            return "not available for this model, which has no end-of-sequence token"
        spelled = tokenizer.spelling.pieces(skip_special_tokens=False)
        plain = tokenizer.spelling.pieces(skip_special_tokens=True)
        tokens = [spelled[id] for id in range(self._vocab_size)]
        special = {id for id, token in enumerate(tokens) if token and not plain[id]}
        for id in self.eos_token_ids:
            special.add(id)
            tokens[id] = tokens[id] or b"<[%d]>" % id  # llguidance needs a name
        return Compiler(Vocabulary(tokens, sorted(special), list(self.eos_token_ids)))


def _allow(mask: bytearray, ids: Sequence[int]) -> None:
    for id in ids:
        mask[id >> 3] |= 1 << (id & 7)


def _intersection(a: bytes | bytearray, b: bytes) -> bytearray:
    """The bits that are set in both of two masks of one length."""
    both = int.from_bytes(a, "little") & int.from_bytes(b, "little")
    return bytearray(both.to_bytes(len(a), "little"))


def _made(future: Future[Compiler | str]) -> Compiler | None:
    """The compiler of a completed future, or None."""
    if future.cancelled() or future.exception() is not None:
        return None
    compiler = future.result()
    return compiler if isinstance(compiler, Compiler) else None


def _stop(future: Future[Compiler | str]) -> None:
    if (compiler := _made(future)) is not None:
        compiler.stop()


def _load(directory: Path) -> Tokenizer | str:
    """The tokenizer, or a sentence saying why it cannot be used."""
    try:
        return Tokenizer(directory)
    except TextError as error:
        return f"not available for this model ({error})"
