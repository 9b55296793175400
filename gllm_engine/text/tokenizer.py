"""Loads a checkpoint's tokenizer, which turns text into token ids.

Never runs code from a checkpoint, and imports torch only for checkpoints without a tokenizer.json.
Knows nothing of sampling, requests or models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from gllm_engine.files import check_file, read_file, read_object
from gllm_engine.sampling import InvalidField
from gllm_engine.text import deepseek_template, tiktoken_vocabulary
from gllm_engine.text.chat_template import ChatTemplate, Message
from gllm_engine.text.detokenizer import Detokenizer, Spelling
from gllm_engine.text.image_parts import MediaKind

# Limits the length of tables by token id; vocabularies have a few hundred thousand tokens.
MAX_TOKEN_ID = (1 << 24) - 1
MAX_FILE_BYTES = 256 << 20  # the largest known tokenizer.json has 40 MB
MAX_TEMPLATE_LEN = 1 << 20  # characters; templates have a few thousand


class TextError(ValueError):
    """The checkpoint's tokenizer cannot be used; the message names the directory and the reason."""


class Tokenizer:
    """A checkpoint's tokenizer. Threads may share it: after construction only caches change.

    A tokenizer.json is used unchanged. transformers' generic class applies tokenizer_config.json
    to it: added tokens, beginning-of-sequence token, chat template. For a checkpoint without a
    tokenizer.json, transformers' converters make one.

    `spelling`: the bytes of the tokens, for a Detokenizer. `chat_template`: None if it has none.
    `special_tokens`: the ids of the special tokens, by their texts.
    """

    def __init__(self, path: str | Path) -> None:
        """Load the tokenizer in directory `path`. Raises TextError."""
        path = Path(path)
        with _explained(path):
            outer = _load(path)
            self._inner = outer.backend_tokenizer
            self._inner.no_padding()
            self._inner.no_truncation()
            vocabulary = self._inner.get_vocab(with_added_tokens=True)
            _check_ids(vocabulary)
            self.spelling = Spelling(self._inner, _special_tokens(path / "tokenizer.json"))
        special = sorted(self.spelling.special_ids)
        self.special_tokens = {str(self._inner.id_to_token(id)): id for id in special}
        self.vocab_size = len(vocabulary)
        self._longest = max(map(len, vocabulary))  # characters
        self.eos_token_id: int | None = outer.eos_token_id
        self.chat_template = _chat_template(path, outer)

    def encode(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of `text`, with the special tokens that transformers adds (such as the bos).

        Raises InvalidField("prompt"). A text that is too long for `max_tokens` tokens of any kind
        is refused before it is tokenized.
        """
        if max_tokens is not None and len(text) > max_tokens * self._longest:
            problem = f"its {len(text)} characters are more than {max_tokens} tokens can spell"
            raise InvalidField("prompt", f"{problem} (max_model_len)")
        try:
            # A batch, because only a batch releases the GIL: a megabyte of text takes a second.
            (found,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return found.ids
        except TypeError:
            problem = "not text" if not isinstance(text, str) else "holds a lone surrogate"
            raise InvalidField("prompt", problem) from None
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise InvalidField("prompt", f"this model's tokenizer failed at it ({error})") from None

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        The other arguments are those of ChatTemplate.render. Raises InvalidField.
        """
        text = self.render(messages, max_tokens, tools, chat_template_kwargs)
        return self.encode(text, False, max_tokens)

    def render(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; the arguments are those of `chat`."""
        if self.chat_template is None:
            raise InvalidField("messages", "this model has no chat template; send plain text")
        limit = {} if max_tokens is None else {"max_chars": max_tokens * self._longest}
        return self.chat_template.render(messages, tools, chat_template_kwargs, **limit)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, as from a Detokenizer without a prompt.

        Equals transformers' decode, except for byte-fallback tokens that are not UTF-8: valid
        characters beside an invalid byte are kept, while transformers drops the whole run.
        """
        detokenizer = Detokenizer(self.spelling, (), skip_special_tokens)
        return detokenizer.feed(ids) + detokenizer.flush()

    def token_text(self, id: int) -> str:
        """The text of a single token, special or not; "" for an id without a token."""
        return self.spelling.pieces(skip_special_tokens=False)[id].decode("utf-8", "replace")

    def media_text(self, kind: MediaKind, placeholder: int) -> str:
        """What stands for an image or a video in a text: what the chat template writes for one
        between two texts, so that it may be more than the token `placeholder`; else that token.
        """
        token = self.token_text(placeholder)
        parts = [("text", "first"), (kind, token), ("text", "last")]
        content = [{"type": kind, "text": text} for kind, text in parts]
        with suppress(InvalidField):  # the template may take other roles, or no images
            text = self.render([{"role": "user", "content": content}])
            written = text.partition("first")[2].partition("last")[0].strip("\n")
            if token in written:
                return written
        return token

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences of all words, at the start of a text and after a space."""
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


def end_token_ids(
    checkpoint_ids: Sequence[int], tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[int, ...]:
    """The end tokens of the checkpoint's configuration, and the tokenizer's end token.

    Many chat-tuned checkpoints name the right end token only in their tokenizer. Ids outside
    the model's `vocab_size` are left out. `tokenizer` None: the checkpoint has no usable one.
    """
    ids = list(checkpoint_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(id for id in ids if 0 <= id < vocab_size))


def _is_panic(error: BaseException) -> bool:
    """Whether an error is a panic in the Rust code of the tokenizers library."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn any error of the libraries that load a tokenizer's files into a TextError."""
    try:
        yield
    except TextError:
        raise
    except RecursionError:
        raise TextError(f"tokenizer: {path} cannot be loaded (JSON nested too deeply)") from None
    except BaseException as error:  # the tokenizers library raises plain Exception on a bad file
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        reason = str(error).strip().split("\n")[0]
        raise TextError(f"tokenizer: {path} cannot be loaded ({reason})") from None


class _AddedToken(msgspec.Struct):
    content: str
    special: bool = False


class _File(msgspec.Struct):
    """The part of a tokenizer.json that `_special_tokens` reads."""

    added_tokens: list[_AddedToken] = []


def _special_tokens(file: Path) -> frozenset[str]:
    """The special tokens of a tokenizer.json. The library loses some of them when
    tokenizer_config.json lists the same token as not special."""
    if not os.path.lexists(file):
        return frozenset()
    content = read_file(file, TextError, MAX_FILE_BYTES)
    added = msgspec.json.decode(content, type=_File).added_tokens
    return frozenset(token.content for token in added if token.special)


def _load(path: Path) -> PreTrainedTokenizerFast:
    if not path.is_dir():
        raise TextError(f"tokenizer: {path} is not a directory")
    _check_files(path, _SIDE_FILES)
    _check_files(path / "additional_chat_templates", ("*.jinja",))
    settings = _object(path / "tokenizer_config.json")
    if not os.path.lexists(path / "tokenizer.json"):
        return _convert(path, settings)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        str(path), local_files_only=True
    )
    _restore_bos(tokenizer, settings)
    return tokenizer


def _check_files(directory: Path, patterns: tuple[str, ...]) -> list[str]:
    """The names of the files that match a pattern. Raises TextError for one that cannot be read:
    transformers would take a FIFO, a directory or a broken link for an absent file.
    """
    names = sorted(os.listdir(directory)) if os.path.lexists(directory) else []
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name in found:
        check_file(directory / name, TextError, MAX_FILE_BYTES)
    return found


def _object(file: Path) -> dict[str, Any]:
    return read_object(file, TextError) if os.path.lexists(file) else {}


def _restore_bos(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]) -> None:
    """Add the beginning-of-sequence token if add_bos_token is set and the class is a Llama one.

    Those classes follow add_bos_token. transformers 5 reads only tokenizer.json, and DeepSeek's
    does not add the token."""
    wanted = settings.get("add_bos_token") and "Llama" in str(settings.get("tokenizer_class"))
    if wanted and tokenizer.encode("")[:1] != [tokenizer.bos_token_id]:
        # mypy sees no setter that does not follow its getter at once.
        tokenizer.add_bos_token = True  # type: ignore[misc]


def _convert(path: Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint without tokenizer.json, converted by transformers."""
    if tiktoken_vocabulary.is_moonshots(path, settings):
        return _with_tokenizer_json(path, tiktoken_vocabulary.convert(path, settings))
    if "auto_map" in settings:
        raise TextError(
            f"tokenizer: {path} has only a tokenizer that is Python code of its own, which is "
            "never run; put a converted tokenizer.json beside it"
        )
    if (path / tiktoken_vocabulary.FILE).exists():
        raise TextError(
            f"tokenizer: {path} has a {tiktoken_vocabulary.FILE}, which does not tell how a text "
            "is split; that is known for the class TikTokenTokenizer only, so put a converted "
            "tokenizer.json beside it"
        )
    if not _check_files(path, _VOCABULARIES):
        raise TextError(
            f"tokenizer: {path} has no tokenizer: neither tokenizer.json nor one to convert "
            f"({', '.join(_VOCABULARIES)})"
        )
    _check_files(path, ("config.json",))
    _check_sentencepiece(path / "tokenizer.model")
    from transformers import AutoTokenizer  # imports torch

    tokenizer = AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TextError(f"tokenizer: {path} has no fast tokenizer ({type(tokenizer).__name__})")
    return tokenizer


def _with_tokenizer_json(path: Path, inner: Inner) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint that has all files but tokenizer.json, which is `inner`."""
    with TemporaryDirectory(prefix="gllm-") as directory:
        for name in _check_files(path, _SIDE_FILES):
            os.symlink(path.absolute() / name, Path(directory) / name)
        inner.save(str(Path(directory) / "tokenizer.json"))
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True
        )
    return tokenizer


def _check_sentencepiece(file: Path) -> None:
    """Raise TextError if a sentencepiece model cannot be read. Otherwise transformers would read it
    as a tiktoken file, and report tiktoken as missing."""
    if not os.path.lexists(file):
        return
    content = read_file(file, TextError, MAX_FILE_BYTES)
    if not content.startswith(b"\n"):  # tiktoken's files are text, this is the first field's tag
        return
    way_out = "or put a converted tokenizer.json beside it"
    try:
        proto = import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        package = "protobuf" if "google" in str(error) else "sentencepiece"
        raise TextError(
            f"tokenizer: to read {file} the package {package} is needed, which is not installed; "
            f"pip install sentencepiece protobuf, {way_out}"
        ) from None
    except Exception as error:  # protobuf's, for code that a newer one has generated
        raise TextError(
            f"tokenizer: {file} cannot be read, because the installed sentencepiece and protobuf "
            f"do not go together ({error}); install others, such as sentencepiece==0.2.1, {way_out}"
        ) from None
    try:
        proto.ModelProto().ParseFromString(content)
    except Exception as error:
        raise TextError(f"tokenizer: {file} is not a sentencepiece model ({error})") from None


def _check_ids(vocabulary: dict[str, int]) -> None:
    if not vocabulary:
        raise ValueError("its vocabulary is empty")
    token, id = max(vocabulary.items(), key=lambda item: item[1])
    if id > MAX_TOKEN_ID:
        raise ValueError(
            f"token {token!r:.40} has the id {id}, at most {MAX_TOKEN_ID} is supported"
        )


def _chat_template(path: Path, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | None:
    """The tokenizer's chat template, else the one in chat_template.json, written by processors.

    DeepSeek V3.2 has none: its format is in Python code, which is never run.
    """
    found = tokenizer.chat_template
    if found is None:
        found = _object(path / "chat_template.json").get("chat_template")
    if found is None and _is_deepseek_v32(path):
        found = deepseek_template.TEMPLATE
    if found is None:
        return None
    templates = {"default": found} if isinstance(found, str) else found
    if not isinstance(templates, dict) or not all(isinstance(t, str) for t in templates.values()):
        raise TextError(f"tokenizer: the chat template of {path} is neither text nor texts by name")
    if sum(map(len, templates.values())) > MAX_TEMPLATE_LEN:
        raise TextError(
            f"tokenizer: the chat template of {path} has more than {MAX_TEMPLATE_LEN} characters"
        )
    return ChatTemplate(templates, tokenizer.special_tokens_map)


def _is_deepseek_v32(path: Path) -> bool:
    architectures = _object(path / "config.json").get("architectures")
    return isinstance(architectures, list) and "DeepseekV32ForCausalLM" in architectures


# Files beside the vocabulary that transformers and this module read.
_SIDE_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
# Vocabulary files that transformers' converters read.
_VOCABULARIES = ("*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")
