"""Grammars on the smallest vocabulary: a token for each byte, and the end."""

from __future__ import annotations

import random
from functools import lru_cache

from gllm_engine.sampling import StructuredOutputs
from gllm_engine.text.grammar import Vocabulary, compile_grammar, ll_tokenizer, translate

END = 256
TOOL = 257  # special
VOCABULARY = Vocabulary([bytes([b]) for b in range(256)] + [b"", b"<tool>"], [END, TOOL], [END])
TOKENIZER = ll_tokenizer(VOCABULARY)


@lru_cache
def compiled(asked: StructuredOutputs):
    return compile_grammar(TOKENIZER, translate(asked, VOCABULARY))


def matcher(**asked):
    return compiled(StructuredOutputs(**asked)).deep_copy()


def accepts(text: str | bytes | list[int], **asked) -> bool:
    """Whether the whole text, and every part on the way to it, is allowed."""
    found = matcher(**asked)
    for token in text.encode() if isinstance(text, str) else text:
        if token not in following(found):
            return False
        assert found.consume_token(token)
    return END in following(found)


def following(found) -> list[int]:
    mask = found.compute_bitmask()
    assert not found.is_error(), found.get_error()
    return [id for id in range(TOOL + 1) if mask[id >> 3] >> (id & 7) & 1]


def sample(seed: int, max_len: int = 2000, **asked) -> str | None:
    """A random text of the grammar; None if it has no end after so many bytes."""
    rng, found, text = random.Random(seed), matcher(**asked), b""
    for _ in range(max_len):
        tokens = following(found)
        if END in tokens and (len(tokens) == 1 or rng.random() < 0.2):
            return text.decode()
        token = rng.choice([token for token in tokens if token != END])
        assert found.consume_token(token)
        text += bytes([token])
    return None
