"""Kimi's tokenizer from its tiktoken file, against published ids and slow twins."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from made_tokenizers import CORPUS, RELAXED
from tokenizers import Regex, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gllm_engine.text.tiktoken_vocabulary import PATTERN
from gllm_engine.text.tokenizer import TextError, Tokenizer

# As tiktoken gives them for the vocabulary and the pattern of Kimi K2.
PUBLISHED = {
    "Hello world": [19180, 2695],
    "Hello, world!": [19180, 11, 2695, 0],
    "你好世界": [33845, 2243],
    "1234567890": [6694, 12972, 16242, 15],
    "中文English混合": [16717, 44372, 13935],
}
TOKENS = {
    2243: "世界",
    2695: " world",
    6694: "123",
    12972: "456",
    13935: "混合",
    16242: "789",
    16717: "中文",
    19180: "Hello",
    33845: "你好",
    44372: "English",
}
NUM_TOKENS = 44373
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 255: "[PAD]"}
TOOL = "<|tool_call_begin|>"  # not special: it is part of the answer's text
TEMPLATE = "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}"


def write(
    path: Path, tokens: list[bytes], settings: dict[str, Any] | None = None, lines: bytes = b""
) -> Path:
    listed = [b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (path / "tiktoken.model").write_bytes(lines or b"".join(listed))
    first = len(tokens)
    added = {str(first + i): {"content": name, "special": True} for i, name in NAMED.items()}
    added[str(first + 4)] = {"content": TOOL, "special": False}
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config | (settings or {})))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "tokenization_kimi.py").write_text("raise SystemExit('remote code ran')")
    return path


def kimis_tokens() -> list[bytes]:
    """The published tokens at their ids, what they are merged from, and tokens of no text."""
    tokens = [bytes([value]) for value in bytes_to_unicode()]
    for id in (2243, 33845):  # not a whole word of the pattern, so made by merges
        for character in TOKENS[id]:
            tokens += [character.encode()[:2], character.encode()]
    tokens += [b"\xff" + i.to_bytes(2, "big") for i in range(len(tokens), NUM_TOKENS)]
    for id, token in TOKENS.items():
        tokens[id] = token.encode()
    return tokens


@pytest.fixture(scope="module")
def kimi_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("kimi"), kimis_tokens())


@pytest.fixture(scope="module")
def kimi(kimi_dir: Path) -> Tokenizer:
    return Tokenizer(kimi_dir)


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_ids(kimi: Tokenizer, text: str) -> None:
    assert kimi.encode(text) == PUBLISHED[text]
    assert kimi.decode(PUBLISHED[text]) == text


def test_special_tokens(kimi: Tokenizer) -> None:
    assert kimi.vocab_size == NUM_TOKENS + 256
    assert kimi.eos_token_id == NUM_TOKENS + 1
    ids = [NUM_TOKENS + 3, 19180, NUM_TOKENS + 4, 0, NUM_TOKENS + 2]
    assert kimi.encode(f"<|im_user|>Hello{TOOL}!<|im_end|>") == ids
    assert kimi.decode(ids) == f"Hello{TOOL}!"
    assert kimi.decode(ids, skip_special_tokens=False) == f"<|im_user|>Hello{TOOL}!<|im_end|>"
    reserved = NUM_TOKENS + 116
    assert kimi.token_text(reserved) == f"<|reserved_token_{reserved}|>"
    assert kimi.decode([0, reserved, 0]) == "!!"


def test_chat(kimi: Tokenizer) -> None:
    ids = kimi.chat([{"role": "user", "content": "Hello world"}])
    assert ids == [NUM_TOKENS + 3, 19180, 2695, NUM_TOKENS + 2]


def test_no_code_of_the_checkpoint_runs_and_no_torch_is_needed(kimi_dir: Path) -> None:
    code = (
        "import sys; from gllm_engine.text.tokenizer import Tokenizer;"
        f"Tokenizer({str(kimi_dir)!r}).encode('x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# Letters with and without case, marks, Han and other scripts, digits, spaces, signs, contractions.
ALPHABET = (
    "aBǅʰ\u0301\u0903 \t\r\n中文々〇。日本のカ한ßжЖ١1２Ⅷ,.!'’sStTrReEvVmMlLdD_🙂\u200d\u00a0\u3000"
)


SPLIT = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
TWIN = regex.compile(PATTERN, regex.V1)


@RELAXED
@given(st.text(ALPHABET, max_size=40))
def test_the_pattern_splits_as_another_engine(text: str) -> None:
    ours = [piece for piece, _ in SPLIT.pre_tokenize_str(text)]
    assert ours == TWIN.findall(text)
    assert "".join(ours) == text


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """As tiktoken: the neighbours that make the token of least rank are merged first."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[best] not in ranks:
            break
        parts[best : best + 2] = [pairs[best]]
    return [ranks[part] for part in parts]


def test_merges_follow_the_ranks(tmp_path: Path) -> None:
    tokens = [bytes([value]) for value in range(256)]
    known = set(tokens)
    text = " ".join(CORPUS)
    for length in (2, 3, 5, 4, 7):
        data = text.encode()
        for start in range(0, len(data) - length, 3):
            token = data[start : start + length]
            if token not in known:
                known.add(token)
                tokens.append(token)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    loaded = Tokenizer(write(tmp_path, tokens))
    words = [word.encode() for word in TWIN.findall(text)]
    expected = [[ranks[word]] if word in ranks else merged(word, ranks) for word in words]
    assert max(map(len, expected)) > 3
    assert loaded.encode(text) == [id for ids in expected for id in ids]


BYTES = [bytes([value]) for value in range(256)]
LINES = [b64encode(token) + b" %d" % rank for rank, token in enumerate(BYTES)]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([*LINES, b"!!!! 256"], "line 257 is not base64 and a number"),
        ([*LINES, b"aGVsbG8="], "line 257 is not base64 and a number"),
        ([*LINES, b"aGVsbG8= x"], "line 257 is not base64 and a number"),
        ([*LINES, b"aGVsbG8= 257"], "its 257 tokens are not numbered from 0 to 256"),
        ([*LINES, b"AA== 256"], "its 256 tokens are not numbered from 0 to 255"),
        ([*LINES[:-1], b"aGVsbG8= 255"], "no token for the byte 255"),
        (
            [*LINES, b64encode(b"a" * 1025) + b" 256"],
            "the token in line 257 has 1025 bytes, but only 1 to 1024 are supported",
        ),
    ],
    ids=["code", "no rank", "rank", "gap", "twice", "byte", "long"],
)
def test_a_vocabulary_with_faults(tmp_path: Path, lines: list[bytes], sentence: str) -> None:
    write(tmp_path, BYTES, lines=b"\n".join(lines))
    with pytest.raises(TextError) as caught:
        Tokenizer(tmp_path)
    file = tmp_path / "tiktoken.model"
    assert str(caught.value) == f"tokenizer: {tmp_path} cannot be loaded ({file}: {sentence})"


@pytest.mark.parametrize(
    ("added", "sentence"),
    [
        ([], "added_tokens_decoder is not an object"),
        ({"7": {"content": "x"}}, "'7' is not an id from 256 to 511 with the content of a token"),
        ({"300": {"content": 1}}, "'300' is not an id from 256 to 511 with the content"),
        ({"300": "x"}, "'300' is not an id from 256 to 511 with the content of a token"),
    ],
)
def test_special_tokens_with_faults(tmp_path: Path, added: Any, sentence: str) -> None:
    write(tmp_path, BYTES, {"added_tokens_decoder": added})
    with pytest.raises(TextError, match=sentence):
        Tokenizer(tmp_path)


def test_an_unknown_tiktoken_file_is_refused(tmp_path: Path) -> None:
    """Its pattern is in code, so nobody knows how it splits a text."""
    write(tmp_path, BYTES, {"tokenizer_class": "OwnTokenizer"})
    with pytest.raises(TextError, match="Python code of its own, which is never run"):
        Tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["auto_map"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TextError, match="tiktoken.model, which does not tell how a text is split"):
        Tokenizer(tmp_path)
