"""Checkpoints of models with images that come without the vision tower, as exports of text do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load import shard
from tiny_models import all_logits, load, some_tokens

from gllm_engine.arch import FAMILIES, make_arch, read_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.config import EngineConfig, make_config
from gllm_engine.engine.images import ImageLoader
from gllm_engine.images import read_processor
from gllm_engine.model import LoadError
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.sampling import InvalidField
from gllm_engine.text.description import describe_checkpoint
from gllm_engine.text.tokenizer import Tokenizer

SEEING = [name for name in FAMILIES if tiny_config(name).get("vision_config")]
TOWER = ("visual.", "vision_tower.", "mm_projector.", "multi_modal_projector.")


def keep(path: Path, num_left: int) -> list[str]:
    """Remove the tower's tensors but the first ones; returns the names of all of them."""
    tensors = load_file(path / "model.safetensors")
    names = [name for name in tensors if any(part in name for part in TOWER)]
    for name in names[num_left:]:
        del tensors[name]
    save_file(tensors, path / "model.safetensors")
    return names


@pytest.mark.parametrize("family", SEEING)
def test_without_any_tensor_of_the_tower_it_is_a_model_of_text(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_model(tmp_path, family)
    tokens = some_tokens(9)
    expected = all_logits(load(path), tokens)
    assert read_arch(path).vision is not None and not caplog.records
    keep(path, 0)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["a_gate"] = True
    assert make_arch(config).unknown_keys == ("vision_config.a_gate",)
    (path / "config.json").write_text(json.dumps(config))
    arch = read_arch(path)
    assert arch.vision is None and not arch.has_sections and arch.unknown_keys == ()
    assert "no file has a tensor of the vision tower, so it takes no images" in caplog.text
    assert torch.equal(all_logits(load(path), tokens), expected)
    shard(path)
    assert read_arch(path) == arch
    assert torch.equal(all_logits(load(path), tokens), expected)


def test_the_text_may_be_named_as_beside_a_tower(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, "Qwen3_5ForConditionalGeneration")
    tokens = some_tokens(9)
    expected = all_logits(load(path), tokens)
    keep(path, 0)
    tensors = load_file(path / "model.safetensors")
    long = {name.replace("model.", "model.language_model."): t for name, t in tensors.items()}
    assert not any("language_model" in name for name in tensors)
    save_file(long, path / "model.safetensors")
    assert torch.equal(all_logits(load(path), tokens), expected)


@pytest.mark.parametrize("family", SEEING)
def test_with_a_part_of_the_tower_the_first_missing_tensor_is_named(
    tmp_path: Path, family: str
) -> None:
    path = write_tiny_model(tmp_path, family)
    names = keep(path, 1)
    with pytest.raises(LoadError, match=rf"is missing \(and {len(names) - 2} more\)$") as caught:
        load(path)
    assert str(caught.value).split("tensor ")[1].split(" is")[0] in names[1:]


def test_front_ends_take_no_images_for_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, "Qwen3VLForConditionalGeneration")
    assert read_processor(EngineConfig(model=str(path))) is not None
    keep(path, 0)
    assert read_processor(EngineConfig(model=str(path))) is None
    tokenizer = Tokenizer(path)
    images = ImageLoader(make_config({"model": str(path)}), tokenizer)
    with pytest.raises(InvalidField, match="image: this model takes no images"):
        images.check([b"a picture"])
    described = describe_checkpoint(path, tokenizer, images.modalities)
    assert described["input_modalities"] == ["text"]
    images.close()


@pytest.mark.parametrize("damage", ["no file", "no index", "broken"])
def test_files_that_tell_nothing_are_left_to_the_load(tmp_path: Path, damage: str) -> None:
    path = write_tiny_model(tmp_path, "Qwen3VLForConditionalGeneration")
    file = path / "model.safetensors"
    if damage == "no index":
        (path / "model.safetensors.index.json").write_text("{}")
    elif damage == "broken":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    assert read_arch(path).vision is not None
    with pytest.raises(LoadError):
        load(path)


def test_the_log_says_so_once_a_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_model(tmp_path, "Qwen3VLForConditionalGeneration")
    keep(path, 0)
    read_arch(path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
