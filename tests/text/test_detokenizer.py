"""The detokenizer against decoding everything at once, and both against transformers."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_tokenizers import RELAXED, metaspace, save
from transformers import PreTrainedTokenizerFast

from gllm_engine.text.detokenizer import Detokenizer
from gllm_engine.text.tokenizer import TextError, Tokenizer


def pieces_of(tokenizer, prompt, output, sizes, skip=True):
    detokenizer = Detokenizer(tokenizer.spelling, prompt, skip)
    at, pieces = 0, []
    while at < len(output):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.feed(output[at : at + size]))
        at += size
    return [*pieces, detokenizer.flush()]


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
    byte_ids = {tokenizer.spelling.pieces(False)[id]: id for id in range(tokenizer.vocab_size)}
    lead, middle = byte_ids[b"\xe4"], byte_ids[b"\xbd"]
    detokenizer = Detokenizer(tokenizer.spelling, tokenizer.encode("x"))
    assert detokenizer.feed([lead]) == ""
    assert detokenizer.feed([middle]) == ""
    assert detokenizer.flush() == "\ufffd"
    detokenizer = Detokenizer(tokenizer.spelling, tokenizer.encode("x"))
    assert [detokenizer.feed([id]) for id in (lead, middle, byte_ids[b"\xa0"])] == ["", "", "你"]


def test_a_character_begun_by_the_prompt_is_completed(tokenizer):
    byte_ids = {tokenizer.spelling.pieces(False)[id]: id for id in range(tokenizer.vocab_size)}
    smile = [byte_ids[bytes([value])] for value in "🙂".encode()]
    for begun in (1, 2, 3):
        prompt = tokenizer.encode("x") + smile[:begun]
        assert "".join(pieces_of(tokenizer, prompt, smile[begun:], [1])) == "🙂"
        # Not completed: the replacement character is the prompt's, not the output's.
        assert "".join(pieces_of(tokenizer, prompt, smile[:1], [1])) == "\ufffd"


def test_bytes_of_the_prompt_that_are_no_character_stay_the_prompts(tokenizer):
    byte_ids = {tokenizer.spelling.pieces(False)[id]: id for id in range(tokenizer.vocab_size)}
    prompt = [byte_ids[b"\xed"], byte_ids[b"\xa0"]]  # half of a surrogate pair: two of them
    for output, text in (([], ""), ([byte_ids[b"\x80"]], "\ufffd"), ([byte_ids[b"a"]], "a")):
        assert tokenizer.decode(prompt + output, False) == "\ufffd\ufffd" + text
        assert "".join(pieces_of(tokenizer, prompt, output, [1], False)) == text


def test_the_space_after_a_prompt_is_kept(tokenizer):
    world = tokenizer.encode(" world", add_special_tokens=False)
    text = "".join(pieces_of(tokenizer, tokenizer.encode("Hello"), world, [1]))
    assert text.endswith(" world")
    # After a prompt without text (only a bos), output begins a text.
    start = tokenizer.encode("")
    word = tokenizer.encode("world", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, start, word, [1])) == "world"


def test_invalid_bytes_do_not_hold_text_back_for_ever(tokenizer):
    byte_ids = {tokenizer.spelling.pieces(False)[id]: id for id in range(tokenizer.vocab_size)}
    detokenizer = Detokenizer(tokenizer.spelling, tokenizer.encode("x"))
    assert detokenizer.feed([byte_ids[b"\xff"]] * 500) == "\ufffd" * 500


def test_cost_a_token(tokenizer):
    output = tokenizer.encode("Hello world, hello there! 日本語 🙂 " * 200)
    detokenizer = Detokenizer(tokenizer.spelling, output[:5])
    detokenizer.feed(output)
    best = {}
    for size in (1, 8):
        runs = []
        for _ in range(5):
            begin = time.thread_time()
            for at in range(0, len(output), size):
                detokenizer.feed(output[at : at + size])
            runs.append((time.thread_time() - begin) / len(output))
        best[size] = min(runs)
    assert best[1] < 10e-6 and best[8] < best[1], best


# ---------------------------------------------------------------- Metaspace, special tokens, rules


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    directory = tmp_path_factory.mktemp("metaspace")
    save(metaspace(), directory)
    return Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(str(directory))


@RELAXED
@given(data=st.data(), skip=st.booleans())
def test_metaspace_decodes_as_the_library_does(words, data, skip):
    tokenizer, reference = words
    marked = [id for token, id in reference.get_vocab().items() if "▁" in token]
    id = st.one_of(st.sampled_from(marked), st.integers(0, tokenizer.vocab_size + 1))
    ids = data.draw(st.lists(id, max_size=8))
    text = tokenizer.decode(ids, skip)
    assert text == reference.decode(ids, skip_special_tokens=skip)
    cut = data.draw(st.integers(0, len(ids)))
    before = tokenizer.decode(ids[:cut], skip)
    assert before + "".join(pieces_of(tokenizer, ids[:cut], ids[cut:], [1], skip)) == text


def test_the_first_token_loses_all_its_word_markers(words):
    tokenizer, reference = words
    vocabulary = reference.get_vocab()
    twice = vocabulary["▁▁in▁▁"]
    assert tokenizer.decode([twice]) == "in" == reference.decode([twice])
    assert tokenizer.decode([twice, twice]) == "in  in  "
    bos = tokenizer.encode("")
    assert "".join(pieces_of(tokenizer, bos, [twice], [1])) == "in"
    assert "".join(pieces_of(tokenizer, bos, [twice], [1], skip=False)) == "  in  "


@pytest.mark.parametrize("earlier", [True, False])
def test_a_token_that_either_file_calls_special_is_skipped(tokenizer_dir, tmp_path, earlier):
    """`earlier`: whether tokenizer.json does, or tokenizer_config.json."""
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    mask_id = Tokenizer(tokenizer_dir).vocab_size
    mask = content["added_tokens"][0] | {"id": mask_id, "content": "[gMASK]", "special": earlier}
    content["added_tokens"].append(mask)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    later = {"content": "[gMASK]", "special": not earlier}
    settings["added_tokens_decoder"] = {str(mask_id): later}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("[gMASK]", add_special_tokens=False) == [mask_id]
    assert tokenizer.decode([mask_id]) == ""
    assert tokenizer.decode([mask_id], skip_special_tokens=False) == "[gMASK]"


@pytest.mark.parametrize(
    ("decoder", "sentence"),
    [
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "decoder WordPiece is not supp"),
        ({"type": "Strip", "content": " ", "start": 1, "stop": 0}, "Strip is supported that comes"),
        (
            {"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"},
            "replaces by regular expression is not supported",
        ),
    ],
)
def test_a_decoder_that_is_not_supported_is_named(tokenizer_dir, tmp_path, decoder, sentence):
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | {"decoder": decoder}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TextError, match=sentence):
        Tokenizer(tmp_path)
