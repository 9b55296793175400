"""Fixtures: a tokenizer of each kind, ours and transformers' of the same files."""

from __future__ import annotations

import pytest
from made_tokenizers import byte_fallback, byte_level, save
from transformers import PreTrainedTokenizerFast

from gllm_engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="session", params=[byte_level, byte_fallback])
def tokenizer_dir(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param.__name__)
    save(request.param(), directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    return Tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def reference(tokenizer_dir) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(tokenizer_dir))
