"""Makes a tokenizer from the tiktoken vocabulary of Moonshot's models: Moonlight and Kimi.

Such a checkpoint has the vocabulary and its special tokens, but the pattern that splits a text is
in Python code, which is never run. transformers' converter reads the same files, but splits by the
pattern of GPT-4, which does not split Chinese from other letters.
"""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from gllm_engine.files import read_file

FILE = "tiktoken.model"
_MAX_FILE_BYTES = 64 << 20  # Kimi's has 3 MB
# Conversion takes time in proportion to their product.
_MAX_TOKENS = 1 << 20
_MAX_TOKEN_BYTES = 1024
_NUM_SPECIAL = 256
# Letters without case are in both.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_AFTER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_AFTER}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def is_moonshots(path: Path, settings: dict[str, Any]) -> bool:
    """Whether the checkpoint in `path` has such a vocabulary. `settings`: tokenizer_config.json."""
    return settings.get("tokenizer_class") == "TikTokenTokenizer" and (path / FILE).exists()


def convert(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of the checkpoint in `path`. Raises ValueError for a file with faults."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = _read_ranks(path / FILE)

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            """In place of the package tiktoken."""
            del tiktoken_url
            return ranks

    make_converter: Any = Converter  # it has no types
    tokenizer: Tokenizer = make_converter(pattern=PATTERN).converted()
    tokenizer.add_tokens(_special_tokens(len(ranks), settings))
    return tokenizer


def _read_ranks(file: Path) -> dict[bytes, int]:
    """The bytes of every token and its id, from lines of base64 and a number."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(file, ValueError, _MAX_FILE_BYTES).splitlines(), 1):
        if not line:
            continue
        try:
            code, rank = line.split()
            token = b64decode(code, validate=True)
            ranks[token] = int(rank)
        except ValueError:
            raise ValueError(f"{file}: line {number} is not base64 and a number") from None
        if not 0 < len(token) <= _MAX_TOKEN_BYTES:
            raise ValueError(
                f"{file}: the token in line {number} has {len(token)} bytes, but only 1 to "
                f"{_MAX_TOKEN_BYTES} are supported"
            )
    count = len(ranks)
    if count > _MAX_TOKENS:
        raise ValueError(f"{file}: {count} tokens, but only up to {_MAX_TOKENS} are supported")
    if sorted(ranks.values()) != list(range(count)):
        raise ValueError(f"{file}: its {count} tokens are not numbered from 0 to {count - 1}")
    if missing := [value for value in range(256) if bytes([value]) not in ranks]:
        raise ValueError(f"{file}: no token for the byte {missing[0]}")
    return ranks


def _special_tokens(first: int, settings: dict[str, Any]) -> list[AddedToken]:
    """The tokens after the vocabulary, from the id `first` on; those without a name are reserved.

    A token that is not special is one of the text, such as the beginning of a tool call.
    """
    tokens = {
        str(id): AddedToken(f"<|reserved_token_{id}|>", normalized=False, special=True)
        for id in range(first, first + _NUM_SPECIAL)
    }
    named = settings.get("added_tokens_decoder", {})
    if not isinstance(named, dict):
        raise ValueError("added_tokens_decoder is not an object")
    for id, about in named.items():
        match about:
            case {"content": str(content)} if id in tokens and content:
                special = about.get("special") is True
                tokens[id] = AddedToken(content, normalized=False, special=special)
            case _:
                raise ValueError(
                    f"added_tokens_decoder: {id!r:.40} is not an id from {first} to "
                    f"{first + _NUM_SPECIAL - 1} with the content of a token"
                )
    return list(tokens.values())
