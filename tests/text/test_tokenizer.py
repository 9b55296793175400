"""The tokenizer against transformers, and what becomes of checkpoints that have none."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
from transformers import AutoTokenizer

from gllm_engine.sampling import InvalidField
from gllm_engine.text import tokenizer as text_tokenizer
from gllm_engine.text.tokenizer import TextError, Tokenizer, end_token_ids

TEXTS = [
    "Hello world, hello there!",
    " leading and  double spaces ",
    "日本語 你好 🙂👨‍👩‍👧 e\u0301 \u0928\u093f",
    "<|im_start|>user\nspecials in the text<|im_end|>",
    "a <tool call> b 日本🙂 c\n\n\t",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_transformers(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(
        text, add_special_tokens=False
    )
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


def test_auto_tokenizer_agrees(tokenizer, tokenizer_dir):
    auto = AutoTokenizer.from_pretrained(str(tokenizer_dir), trust_remote_code=False)
    for text in TEXTS:
        assert tokenizer.encode(text) == auto.encode(text)
    assert tokenizer.eos_token_id == auto.eos_token_id


def test_a_text_that_no_tokens_can_spell_is_refused_at_once(tokenizer):
    began = time.process_time()
    with pytest.raises(InvalidField, match="prompt: its 50000000 characters are more than 100 tok"):
        tokenizer.encode("a" * 50_000_000, max_tokens=100)
    with pytest.raises(InvalidField, match="prompt: its 10000.* characters are more than"):
        tokenizer.chat([{"role": "user", "content": "a" * 10_000_000}], max_tokens=100)
    assert time.process_time() - began < 5
    assert len(tokenizer.encode("Hello " * 50, max_tokens=60)) > 60  # only what is certain


def test_a_long_text_does_not_stop_other_threads(tokenizer):
    text = "Hello world, hello there! " * 40_000
    pauses, ended = [], threading.Event()

    def tick():
        while not ended.is_set():
            began = time.monotonic()
            time.sleep(0.001)
            pauses.append(time.monotonic() - began)

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.monotonic()
    tokenizer.encode(text)
    took = time.monotonic() - began
    ended.set()
    thread.join()
    assert max(pauses) < took / 2


def test_loading_needs_no_torch(tokenizer_dir):
    code = (
        "import sys; from gllm_engine.text.tokenizer import Tokenizer;"
        f"t = Tokenizer({str(tokenizer_dir)!r}); t.chat([dict(role='user', content='x')]);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize(("kind", "begins"), [("LlamaTokenizerFast", True), ("Qwen2", False)])
def test_the_llama_class_of_old_adds_a_bos_that_tokenizer_json_lacks(
    tokenizer_dir, reference, tmp_path, kind, begins
):
    changes = {
        "tokenizer.json": {"post_processor": None},  # DeepSeek's are so
        "tokenizer_config.json": {"tokenizer_class": kind, "add_bos_token": True},
    }
    for name, change in changes.items():
        content = json.loads((tokenizer_dir / name).read_text()) | change
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer, bos = Tokenizer(tmp_path), [reference.bos_token_id]
    assert (tokenizer.encode("fox")[:1] == bos) is begins
    assert tokenizer.encode("fox", add_special_tokens=False)[:1] != bos


def test_unusable_checkpoints_get_a_sentence(tmp_path):
    with pytest.raises(TextError, match="is not a directory"):
        Tokenizer(tmp_path / "nothing")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(TextError, match="Python code of its own, which is never run"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(TextError, match="cannot be loaded"):
        Tokenizer(tmp_path)


def test_a_tokenizer_json_beside_custom_code_is_used(tokenizer_dir, tmp_path):
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('remote code ran')")
    assert Tokenizer(tmp_path).encode("Hello") == Tokenizer(tokenizer_dir).encode("Hello")


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(InvalidField, match="lone surrogate"):
        tokenizer.encode("a\ud800b")


def test_bad_words_with_and_without_space(tokenizer):
    found = tokenizer.bad_words(["fox"])
    texts = {tokenizer.decode(list(ids)).strip() for ids in found}
    assert texts == {"fox"}
    assert any(
        b"".join(tokenizer.spelling.pieces(True)[i] for i in ids) == b" fox" for ids in found
    )


# ---------------------------------------------------------------- checkpoints with faults


def changed(source, target, name="tokenizer.json", **changes):
    """A copy of a checkpoint's tokenizer with other values in one of its files."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / name).read_text()) if (target / name).exists() else {}
    (target / name).write_text(json.dumps(content | changes))
    return target


@pytest.mark.parametrize("field", ["pre_tokenizer", "normalizer"])
def test_rules_that_backtrack_cost_the_request_only(tokenizer_dir, tmp_path, field):
    pattern = {"pattern": {"Regex": "(a+)+$"}}
    rules = {
        "pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False},
        "normalizer": {"type": "Replace", "content": "x"},
    }
    changed(tokenizer_dir, tmp_path, **{field: rules[field] | pattern})
    loaded, word = Tokenizer(tmp_path), "a" * 40 + "b"
    with pytest.raises(InvalidField, match="prompt: this model's tokenizer failed at it .*limit"):
        loaded.encode(word)
    with pytest.raises(InvalidField, match="failed at it"):
        loaded.bad_words([word])
    assert loaded.encode("b") == loaded.encode("b") != []


def test_a_token_id_beyond_all_tables_is_refused(tokenizer_dir, tmp_path):
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    model["vocab"]["huge"] = 4_000_000_000
    changed(tokenizer_dir, tmp_path, model=model)
    with pytest.raises(TextError, match="token 'huge' has the id 4000000000, at most 16777215 is"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
)
def test_a_file_nested_too_deeply_is_refused(tokenizer_dir, tmp_path, name):
    changed(tokenizer_dir, tmp_path)
    (tmp_path / name).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(TextError, match="nested (too deeply|deeper than)"):
        Tokenizer(tmp_path)


def test_a_directory_without_tokenizer_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TextError) as caught:
        Tokenizer(tmp_path)
    assert str(caught.value) == (
        f"tokenizer: {tmp_path} has no tokenizer: neither tokenizer.json nor one to convert "
        "(*.model, vocab.*, merges.txt, *.tiktoken, tekken.json)"
    )


class Proto:
    """What stands for sentencepiece's module of messages."""

    def __init__(self, problem: Exception) -> None:
        self.problem = problem

    def __getattr__(self, name):
        raise self.problem


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (None, "the package sentencepiece is needed, which is not installed; pip install"),
        (ModuleNotFoundError("No module named 'google'"), "the package protobuf is needed"),
        (ValueError("gencode 7, runtime 6"), "do not go together .gencode 7, runtime 6.; install"),
        (Proto(ValueError("wire")), "tokenizer.model is not a sentencepiece model .wire."),
    ],
    ids=["no sentencepiece", "no protobuf", "they disagree", "no model"],
)
def test_what_is_missing_for_a_sentencepiece_model(tmp_path, monkeypatch, module, sentence):
    def load(name):
        assert name == "sentencepiece.sentencepiece_model_pb2"
        if module is None:
            raise ModuleNotFoundError("No module named 'sentencepiece'")
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(text_tokenizer, "import_module", load)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0b\n\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(TextError, match=sentence):
        Tokenizer(tmp_path)


def test_end_tokens_are_the_configurations_and_the_tokenizers(tokenizer):
    eos = tokenizer.eos_token_id
    assert end_token_ids((7, 5), tokenizer, 1000) == (7, 5, eos)
    assert end_token_ids((eos, 5, eos), tokenizer, 1000) == (eos, 5)
    assert end_token_ids((), tokenizer, 1000) == (eos,)
    assert end_token_ids((0, 1000), tokenizer, eos) == (0,)  # below the model's vocabulary
    assert end_token_ids((7,), None, 1000) == (7,)
