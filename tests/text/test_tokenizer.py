"""The tokenizer against transformers, the detokenizer against decoding everything at once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gllm_engine.sampling import InvalidField
from gllm_engine.text.tokenizer import Detokenizer, TextError, Tokenizer

TEXTS = [
    "Hello world, hello there!",
    " leading and  double spaces ",
    "日本語 你好 🙂👨‍👩‍👧 e\u0301 \u0928\u093f",
    "<|im_start|>user\nspecials in the text<|im_end|>",
    "a <tool call> b 日本🙂 c\n\n\t",
    "",
]
RELAXED = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pieces_of(tokenizer, prompt, output, sizes, skip=True):
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    at, pieces = 0, []
    while at < len(output):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.feed(output[at : at + size]))
        at += size
    return [*pieces, detokenizer.flush()]


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
    began = time.monotonic()
    with pytest.raises(InvalidField, match="prompt: its 50000000 characters are more than 100 tok"):
        tokenizer.encode("a" * 50_000_000, max_tokens=100)
    with pytest.raises(InvalidField, match="prompt: its"):
        tokenizer.chat([{"role": "user", "content": "a" * 10_000_000}], max_tokens=100)
    assert time.monotonic() - began < 5
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


def test_chat_equals_transformers(tokenizer, reference):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hé 🙂"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.chat(messages) == expected
    parts = [{"type": "text", "text": "hé "}, {"type": "text", "text": "🙂"}]
    assert tokenizer.chat([messages[0], {"role": "user", "content": parts}]) == expected
    without = tokenizer.chat(messages, add_generation_prompt=False)
    assert expected[: len(without)] == without != expected


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages: expected a non-empty list of {role, content} objects"),
        ("hello", "messages: expected a non-empty list of {role, content} objects"),
        (["hello"], "messages: message 0 is not an object with role and content"),
        ([{"content": "x"}], "messages: message 0 has no role (a string such as 'user')"),
        ([{"role": "user"}], "messages: message 0 has no content (a string)"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "image"}]}],
            "messages: message 1 has a content part that is not text",
        ),
        (
            [{"role": "wizard", "content": "x"}],
            "messages: the chat template refused them (unknown role wizard)",
        ),
    ],
)
def test_bad_messages_get_a_sentence(tokenizer, messages, sentence):
    with pytest.raises(InvalidField) as caught:
        tokenizer.chat(messages)
    assert str(caught.value) == sentence


def test_whatever_a_template_raises_is_about_the_messages(tokenizer):
    template = "{% for i in range(10 ** 9) %}{% endfor %}"  # OverflowError, in the sandbox
    with pytest.raises(InvalidField, match="messages: the chat template refused them"):
        tokenizer.chat([{"role": "user", "content": "a"}], chat_template=template)


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


def test_a_model_without_template_says_so(tokenizer_dir, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_dir / name).read_bytes())
    with pytest.raises(InvalidField, match="no chat template"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": "x"}])


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


def valid_runs(tokenizer, ids):
    """Whether each run of byte-fallback tokens in `ids` is UTF-8 (byte-level ones always may be
    anything: only byte fallback drops valid characters beside invalid bytes)."""
    run = b""
    for id in [*ids, None]:
        token = "" if id is None else tokenizer._inner.id_to_token(id) or ""
        if token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return False
        run = b""
    return True


@RELAXED
@given(data=st.data(), skip=st.booleans())
def test_decode_of_random_ids_equals_transformers(tokenizer, reference, data, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40))
    text = tokenizer.decode(ids, skip)
    if valid_runs(tokenizer, ids):
        assert text == reference.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces_of(tokenizer, [], ids, [1], skip)) == text


@RELAXED
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_in_the_context_of_the_prompt(tokenizer, data, skip):
    id = st.integers(0, tokenizer.vocab_size - 1)
    prompt = data.draw(st.lists(id, min_size=1, max_size=12))
    output = data.draw(st.lists(id, max_size=30))
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip)
    pieces = pieces_of(tokenizer, prompt, output, sizes, skip)
    if whole.startswith(before):
        assert "".join(pieces) == whole[len(before) :]
    else:  # the output completes a character that the prompt began
        assert before[-1] == "\ufffd"
        assert "".join(pieces) == whole[len(before) - 1 :]


@RELAXED
@given(data=st.data())
def test_real_text_never_shows_half_a_character(tokenizer, data):
    alphabet = st.sampled_from("ab .é日本你🙂👨\u200d👩🇩🇪e\u0301न\u093f")
    text = data.draw(st.text(alphabet, max_size=30))
    prompt = tokenizer.encode("Hello")
    output = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, prompt, output, [1])
    assert not any("\ufffd" in piece for piece in pieces)
    whole = tokenizer.decode(prompt + output)
    assert "".join(pieces) == whole.removeprefix("Hello")


def test_an_unfinished_character_is_held_and_flushed(tokenizer):
    byte_ids = {tokenizer.pieces(False)[id]: id for id in range(tokenizer.vocab_size)}
    lead, middle = byte_ids[b"\xe4"], byte_ids[b"\xbd"]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))
    assert detokenizer.feed([lead]) == ""
    assert detokenizer.feed([middle]) == ""
    assert detokenizer.flush() == "\ufffd"
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))
    assert [detokenizer.feed([id]) for id in (lead, middle, byte_ids[b"\xa0"])] == ["", "", "你"]


def test_a_character_begun_by_the_prompt_is_completed(tokenizer):
    byte_ids = {tokenizer.pieces(False)[id]: id for id in range(tokenizer.vocab_size)}
    smile = [byte_ids[bytes([value])] for value in "🙂".encode()]
    for begun in (1, 2, 3):
        prompt = tokenizer.encode("x") + smile[:begun]
        assert "".join(pieces_of(tokenizer, prompt, smile[begun:], [1])) == "🙂"
        # Not completed: the replacement character is the prompt's, not the output's.
        assert "".join(pieces_of(tokenizer, prompt, smile[:1], [1])) == "\ufffd"


def test_the_space_after_a_prompt_is_kept(tokenizer):
    world = tokenizer.encode(" world", add_special_tokens=False)
    text = "".join(pieces_of(tokenizer, tokenizer.encode("Hello"), world, [1]))
    assert text.endswith(" world")
    # After a prompt without text (only a bos), output begins a text.
    start = tokenizer.encode("")
    word = tokenizer.encode("world", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, start, word, [1])) == "world"


def test_invalid_bytes_do_not_hold_text_back_for_ever(tokenizer):
    byte_ids = {tokenizer.pieces(False)[id]: id for id in range(tokenizer.vocab_size)}
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))
    assert detokenizer.feed([byte_ids[b"\xff"]] * 500) == "\ufffd" * 500


def test_bad_words_with_and_without_space(tokenizer):
    found = tokenizer.bad_words(["fox"])
    texts = {tokenizer.decode(list(ids)).strip() for ids in found}
    assert texts == {"fox"}
    assert any(b"".join(tokenizer.pieces(True)[i] for i in ids) == b" fox" for ids in found)


def test_cost_a_token(tokenizer):
    output = tokenizer.encode("Hello world, hello there! 日本語 🙂 " * 200)
    detokenizer = Detokenizer(tokenizer, output[:5])
    detokenizer.feed(output)
    best = {}
    for size in (1, 8):
        runs = []
        for _ in range(5):
            begin = time.perf_counter()
            for at in range(0, len(output), size):
                detokenizer.feed(output[at : at + size])
            runs.append((time.perf_counter() - begin) / len(output))
        best[size] = min(runs)
    assert best[1] < 10e-6 and best[8] < best[1], best
