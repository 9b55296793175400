"""What a checkpoint tells of itself."""

from __future__ import annotations

import json
import shutil

import pytest

from gllm_engine import ConfigError, Tokenizer, describe_checkpoint

GIVEN = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 2048, "repetition_penalty": 1}
USELESS = {"top_p": 1.5, "min_p": None, "do_sample": True, "eos_token_id": [2]}


def test_only_valid_sampling_defaults_are_told(tokenizer_dir, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"architectures": ["A"]}')
    generation = tmp_path / "generation_config.json"
    generation.unlink(missing_ok=True)
    tokenizer = Tokenizer(tmp_path)
    found = describe_checkpoint(tmp_path, tokenizer)
    assert found["generation_config"] == {} and found["architectures"] == ["A"]
    assert found["chat_template"] == {"default": (tmp_path / "chat_template.jinja").read_text()}
    assert found["special_tokens"] and all(found["special_tokens"])
    for text, id in found["special_tokens"].items():
        assert tokenizer.encode(text, add_special_tokens=False) == [id]
        assert (tokenizer.token_text(id), tokenizer.decode([id])) == (text, "")
    generation.write_text(json.dumps(GIVEN | USELESS))
    assert describe_checkpoint(tmp_path, tokenizer)["generation_config"] == GIVEN
    generation.write_text("[]")
    with pytest.raises(ConfigError, match="generation_config.json: a JSON object is expected"):
        describe_checkpoint(tmp_path, tokenizer)
