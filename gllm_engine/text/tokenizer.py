"""Text to token ids and back: the tokenizer, the chat template, the incremental detokenizer.

Owns everything that knows what a token looks like. Knows nothing of sampling, requests or models.
Never runs code from a checkpoint, and needs torch only for checkpoints without a tokenizer.json.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gllm_engine.sampling import InvalidField

Message = dict[str, Any]


class TextError(ValueError):
    """The checkpoint's tokenizer cannot be used; the message names the directory and the reason."""


class Tokenizer:
    """A checkpoint's tokenizer. Shared by threads: nothing changes after construction but caches.

    tokenizer.json is taken as it is (transformers' generic class applies tokenizer_config.json:
    added tokens, beginning-of-sequence token, chat template); a checkpoint without one goes
    through transformers' own converters.
    """

    def __init__(self, path: str | Path) -> None:
        """Load from directory `path`; raises TextError."""
        self._outer = _load(Path(path))
        self._inner = self._outer.backend_tokenizer
        self._inner.no_padding()
        self._inner.no_truncation()
        self.vocab_size: int = self._inner.get_vocab_size(with_added_tokens=True)
        self._longest = max(map(len, self._inner.get_vocab(with_added_tokens=True)))  # characters
        self.eos_token_id: int | None = self._outer.eos_token_id
        self.has_chat_template: bool = self._outer.chat_template is not None
        added = self._inner.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        decoder = self._inner.decoder
        # Its pickled state is its part of tokenizer.json; the whole would take a second to write.
        rules = _decoder_rules(None if decoder is None else json.loads(decoder.__getstate__()))
        self.leading_spaces = _leading_spaces(rules)
        spell = _speller(rules)
        self._shown = _Pieces(lambda id: self._spell(spell, id))
        self._plain = _Pieces(lambda id: b"" if id in self._special else self._shown[id])

    def encode(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of `text`, with the special tokens transformers adds (such as the bos).

        Raises InvalidField("prompt"), at once for a text that no `max_tokens` tokens can spell.
        """
        if max_tokens is not None and len(text) > max_tokens * self._longest:
            problem = f"its {len(text)} characters are more than {max_tokens} tokens can spell"
            raise InvalidField("prompt", f"{problem} (max_model_len)")
        try:
            # As a batch, because that alone lets other threads run: a megabyte takes a second.
            (found,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return found.ids
        except TypeError:
            problem = "not text" if not isinstance(text, str) else "holds a lone surrogate"
            raise InvalidField("prompt", problem) from None

    def chat(
        self, messages: Sequence[Message], max_tokens: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        `messages`: [{"role": ..., "content": ...}, ...]; other keys and `options` (such as tools
        or enable_thinking) go to the checkpoint's template. Raises InvalidField("messages"), and
        what `encode` raises.
        """
        conversation = _check_messages(messages)
        if not self.has_chat_template:
            raise InvalidField("messages", "this model has no chat template; send plain text")
        options = {"add_generation_prompt": True} | options
        try:
            text = self._outer.apply_chat_template(conversation, tokenize=False, **options)
        except Exception as error:  # the template is a program; what it raises is about them
            raise InvalidField("messages", f"the chat template refused them ({error})") from None
        return self.encode(text, False, max_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`: what a Detokenizer makes of them without a prompt.

        Equals transformers' decode, but for byte-fallback tokens that are not UTF-8: valid
        characters beside an invalid byte are kept, where transformers drops the whole run.
        """
        detokenizer = Detokenizer(self, (), skip_special_tokens)
        return detokenizer.feed(ids) + detokenizer.flush()

    def token_text(self, id: int) -> str:
        """How one token reads on its own, special or not; "" for an id that names no token."""
        return self._shown[id].decode("utf-8", "replace")

    def pieces(self, skip_special_tokens: bool) -> dict[int, bytes]:
        """UTF-8 bytes by token id; they add up to the text of a sequence. Filled on demand."""
        return self._plain if skip_special_tokens else self._shown

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that spell each word, at the start of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            single = self._inner.token_to_id(word)
            spellings = [] if single is None else [[single]]
            spellings += [
                self.encode(text, add_special_tokens=False) for text in (word, " " + word)
            ]
            found |= dict.fromkeys(tuple(ids) for ids in spellings if ids)
        return tuple(found)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return self._inner.to_str()

    def _spell(self, spell: Callable[[str], bytes], id: int) -> bytes:
        token = self._inner.id_to_token(id) if 0 <= id < 2**32 else None  # it takes no others
        return b"" if token is None else spell(token)


class Detokenizer:
    """Turns token ids into text as they come, after a prompt.

    Pieces add up to decode(prompt + output) without decode(prompt). A character whose bytes have
    not all come is held back. Cost: a table look-up and a UTF-8 decode of the new bytes.
    """

    __slots__ = ("_leading", "_pieces", "_split", "_utf8")

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._pieces = tokenizer.pieces(skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for id in reversed(prompt_ids):
            tail = self._pieces[id] + tail
            if len(tail) >= 3:  # an incomplete character has at most three bytes
                break
        self._utf8.decode(tail[-3:])
        # The prompt may end inside a character. If the output does not complete it, the
        # replacement character it gives belongs to the prompt.
        self._split = self._utf8.getstate()[0] != b""
        self._leading = 0 if tail else tokenizer.leading_spaces

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; "" when they end inside a character."""
        return self._trim(self._utf8.decode(b"".join(map(self._pieces.__getitem__, ids))))

    def flush(self) -> str:
        """The end of the text: a replacement character if it ends inside a character."""
        return self._trim(self._utf8.decode(b"", True))

    def _trim(self, text: str) -> str:
        if self._split and text:
            text = text.removeprefix("\ufffd")
            self._split = False
        while self._leading and text:
            if text[0] != " ":
                self._leading = 0
                break
            text = text[1:]
            self._leading -= 1
        return text


class _Pieces(dict[int, bytes]):
    """A table filled as it is read: a front end starts without spelling 150,000 tokens."""

    def __init__(self, spell: Callable[[int], bytes]) -> None:
        self._spell = spell

    def __missing__(self, id: int) -> bytes:
        piece = self[id] = self._spell(id)
        return piece


def _load(path: Path) -> PreTrainedTokenizerFast:
    if not path.is_dir():
        raise TextError(f"tokenizer: {path} is not a directory")
    try:
        if (path / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
            _restore_bos(tokenizer, _settings(path))
            return tokenizer
        return _convert(path)
    except TextError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception on a bad file
        reason = str(error).strip().split("\n")[0]
        raise TextError(f"tokenizer: {path} cannot be loaded ({reason})") from None


def _restore_bos(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]) -> None:
    """Begin texts as the class that the checkpoint names did: by its own switch, whatever
    tokenizer.json says. DeepSeek's says nothing; transformers 5 reads no more than that."""
    wanted = settings.get("add_bos_token") and "Llama" in str(settings.get("tokenizer_class"))
    if wanted and tokenizer.encode("")[:1] != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True


def _settings(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _convert(path: Path) -> PreTrainedTokenizerFast:
    """A checkpoint without tokenizer.json: transformers converts what it has, or refuses."""
    if "auto_map" in _settings(path):
        raise TextError(
            f"tokenizer: {path} has only a tokenizer that is Python code of its own, which is "
            "never run; put a converted tokenizer.json beside it"
        )
    from transformers import AutoTokenizer  # imports torch

    tokenizer = AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TextError(f"tokenizer: {path} has no fast tokenizer ({type(tokenizer).__name__})")
    return tokenizer


def _check_messages(messages: Sequence[Message]) -> list[Message]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidField("messages", "expected a non-empty list of {role, content} objects")
    return [_check_message(index, message) for index, message in enumerate(messages)]


def _check_message(index: int, message: Message) -> Message:
    where = f"message {index}"
    if not isinstance(message, dict):
        raise InvalidField("messages", f"{where} is not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidField("messages", f"{where} has no role (a string such as 'user')")
    if content is None and message.get("tool_calls"):
        return message
    if isinstance(content, list):
        return {**message, "content": "".join(_part_text(where, part) for part in content)}
    if not isinstance(content, str):
        raise InvalidField("messages", f"{where} has no content (a string)")
    return message


def _part_text(where: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InvalidField("messages", f"{where} has a content part that is not text")
    return text


def _decoder_rules(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's decoder; all must work on each token by itself."""
    rules = [{"type": None}] if decoder is None else decoder.get("decoders", [decoder])
    for rule in rules:
        if rule["type"] not in _RULES:
            known = ", ".join(_RULES)
            raise TextError(
                f"tokenizer: decoder {rule['type']} is not supported; known are {known}"
            )
    return rules


def _leading_spaces(rules: list[dict[str, Any]]) -> int:
    """How many spaces a text loses at its very start."""
    count = 0
    for rule in rules:
        if rule["type"] == "Strip":
            count += rule["start"]
        elif rule["type"] == "Metaspace" and rule.get("prepend_scheme", "always") != "never":
            count += 1
    return count


def _speller(rules: list[dict[str, Any]]) -> Callable[[str], bytes]:
    """A function from a token as the vocabulary spells it to its UTF-8 bytes."""
    steps = [step for rule in rules if (step := _RULES[rule["type"]](rule)) is not None]

    def spell(token: str) -> bytes:
        piece: str | bytes = token
        for step in steps:
            if isinstance(piece, str):
                piece = step(piece)
        return piece if isinstance(piece, bytes) else piece.encode()

    return spell


def _byte_level(rule: dict[str, Any]) -> Callable[[str], bytes]:
    def step(token: str) -> bytes:
        try:
            return bytes([_BYTE_OF[char] for char in token])
        except KeyError:  # an added token is spelled in plain characters
            return token.encode()

    return step


def _byte_fallback(rule: dict[str, Any]) -> Callable[[str], str | bytes]:
    byte_tokens = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}
    return lambda token: byte_tokens.get(token, token)


def _replace(rule: dict[str, Any]) -> Callable[[str], str]:
    pattern, content = rule["pattern"], rule["content"]
    if "String" not in pattern:
        raise TextError("tokenizer: a decoder that replaces by regular expression is not supported")
    return lambda token: token.replace(pattern["String"], content)


# GPT-2's spelling of bytes.
_BYTE_OF = {char: value for value, char in bytes_to_unicode().items()}

# Steps that change single tokens, by the "type" in tokenizer.json; None: nothing to do a token.
_RULES: dict[str, Callable[[dict[str, Any]], Callable[[str], Any] | None]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Replace": _replace,
    "Metaspace": lambda rule: lambda token: token.replace(rule["replacement"], " "),
    "Fuse": lambda rule: None,
    "Strip": lambda rule: None,
}
