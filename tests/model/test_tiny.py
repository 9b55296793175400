"""Tiny models are whole: weights, tokenizer, chat template; the same from the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import load, make_batch, poisoned_cache, run, some_tokens
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gllm_engine.arch import FAMILIES, ArchError, read_arch
from gllm_engine.model.tiny import MIN_VOCAB, SPECIAL_TOKENS, write_tiny_model

TEXTS = (
    "The quick brown fox",
    "  leading spaces, and\n\n\tnewlines \n",
    "Straße, naïve, 你好世界, こんにちは, 안녕하세요, Привет",
    "🙂🚀👩‍💻🇩🇪",
    "\x00\x7f\u0301",
)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_seed_is_a_model(tmp_path: Path) -> None:
    first, again, other = (
        write_tiny_model(tmp_path / name, seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert files(first) == files(again)
    assert files(first)["model.safetensors"] != files(other)["model.safetensors"]
    assert files(first)["tokenizer.json"] == files(other)["tokenizer.json"]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_are_random(tmp_path: Path, family: str) -> None:
    tensors = load_file(write_tiny_model(tmp_path, family) / "model.safetensors")
    small = [name for name, tensor in tensors.items() if tensor.ndim == 1]
    assert small
    for name in small:
        assert tensors[name].std() > 0.05, name


def test_tokenizer_round_trips_any_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_tiny_model(tmp_path) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 384
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0])  # there are merges
    assert len(tokenizer.encode("🇩🇪").ids) > 2  # characters split over tokens do occur


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_tokenizer(tmp_path: Path, family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path, family))
    assert tokenizer.eos_token_id == 2
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(2) == 1


def test_vocabulary_larger_and_smaller(tmp_path: Path) -> None:
    large = write_tiny_model(tmp_path / "large", vocab_size=1000)
    assert load_file(large / "model.safetensors")["lm_head.weight"].shape == (1000, 64)
    small = write_tiny_model(tmp_path / "small", vocab_size=MIN_VOCAB)
    assert Tokenizer.from_file(str(small / "tokenizer.json")).get_vocab_size() == MIN_VOCAB
    with pytest.raises(ValueError, match="vocabulary of 258 tokens: at least 259 are needed"):
        write_tiny_model(tmp_path / "too_small", vocab_size=258)


def test_dtype(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "half", dtype="bfloat16")
    tensors = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        write_tiny_model(tmp_path / "other", dtype="int8")


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(ArchError, match=r"family 'Gpt2' is not supported; supported are Llama"):
        write_tiny_model(tmp_path, "Gpt2")


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    assert read_arch(write_tiny_model(tmp_path)).eos_token_ids == (2, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_varies(tmp_path: Path, family: str) -> None:
    """Different prompts, different continuations, and not one token for ever."""
    decoder, texts = load(write_tiny_model(tmp_path, family)), []
    for seed in range(3):
        tokens = some_tokens(8, seed=seed).tolist()
        cache = poisoned_cache(decoder, 8)
        pages, start = list(range(8)), 0
        while len(tokens) < 32:
            batch = make_batch(
                [{"tokens": tokens[start:], "start": start, "pages": pages}], num_pages=8
            )
            start = len(tokens)
            tokens.append(int(run(decoder, batch, cache)[-1].argmax()))
        texts.append(tokens[8:])
    assert len({tuple(text) for text in texts}) == 3
    assert max(len(set(text)) for text in texts) > 4
