"""Descriptions of vision towers: what configs say, what they may leave out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published import PUBLISHED

from gllm_engine.arch import ArchError, Model, make_arch, read_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.arch.vision import Vision

QWEN2_5 = "Qwen2_5_VLForConditionalGeneration"
QWEN3 = "Qwen3VLForConditionalGeneration"
QWEN3_5 = "Qwen3_5ForConditionalGeneration"
LLAVA = "LlavaForConditionalGeneration"
MISTRAL = "Mistral3ForConditionalGeneration"
KIMI = "KimiK25ForConditionalGeneration"


def config_of(family: str, **vision: Any) -> dict[str, Any]:
    config = tiny_config(family)
    return config | {"vision_config": config["vision_config"] | vision}


def vision_of(model: Model) -> Vision:
    assert model.vision is not None
    return model.vision


def test_published_towers() -> None:
    qwen = vision_of(make_arch(PUBLISHED["Qwen2.5-VL-7B"]))
    assert (qwen.dim, qwen.depth, qwen.heads, qwen.hidden, qwen.out) == (1280, 32, 16, 3420, 3584)
    assert (qwen.patch, qwen.merge, qwen.window, qwen.whole) == (14, 2, 4, (7, 15, 23, 31))
    assert (qwen.num_deep, qwen.image_token, qwen.norm) == (0, 151655, "rms")
    assert qwen.grid(1092, 1932) == (39, 69)
    assert [i for i in range(10) if qwen.is_whole(i)] == [7]
    third = vision_of(make_arch(PUBLISHED["Qwen3-VL-8B"]))
    assert (third.deep, third.num_deep, third.table, third.window) == ((8, 16, 24), 3, 48, 0)
    assert third.mean == third.std == (0.5, 0.5, 0.5)
    assert third.is_whole(0)
    assert vision_of(make_arch(PUBLISHED["Qwen3.5-27B"])).image_token == 248056
    llava = vision_of(make_arch(PUBLISHED["llava-1.5-7b"]))
    assert (llava.depth, llava.table, llava.image_token) == (23, 24, 32000)
    assert llava.grid(336, 336) == (24, 24)
    mistral = vision_of(make_arch(PUBLISHED["Mistral-Small-3.2"]))
    assert (mistral.merge, mistral.depth, mistral.image_token) == (2, 24, 10)
    kimi = vision_of(make_arch(PUBLISHED["Kimi-K2.5"]))
    assert (kimi.depth, kimi.hidden, kimi.table, kimi.image_token) == (27, 4304, 64, 163605)


def test_a_text_model_may_be_described_beside_its_tower() -> None:
    """As in the first configs of Qwen2.5-VL."""
    nested = config_of(QWEN2_5)
    flat = nested["text_config"] | {key: nested[key] for key in nested if key != "text_config"}
    assert make_arch(flat) == make_arch(nested)
    assert make_arch(flat).layers


@pytest.mark.parametrize("family", [QWEN2_5, QWEN3, QWEN3_5, LLAVA, MISTRAL, KIMI])
def test_a_config_without_a_tower_is_of_a_text_model(family: str) -> None:
    with_tower = config_of(family)
    text = {key: value for key, value in with_tower.items() if key != "vision_config"}
    assert make_arch(text).vision is None
    assert make_arch(with_tower).layers == make_arch(text).layers
    assert not any(name.startswith("visual.") for name in make_arch(text).weights())
    tower = vision_of(make_arch(with_tower)).weights()
    assert make_arch(with_tower).weights() == make_arch(text).weights() | tower
    assert list(make_arch(with_tower).weights())[-len(tower) :] == list(tower)


def test_unknown_keys_are_told() -> None:
    model = make_arch(config_of(QWEN3, a_gate=True, off=False, initializer_range=0.02))
    assert model.unknown_keys == ("vision_config.a_gate",)


@pytest.mark.parametrize(
    ("family", "vision", "told"),
    [
        (QWEN3, {"num_position_embeddings": 35}, "num_position_embeddings is 35"),
        (QWEN3, {"out_hidden_size": 63}, "out_hidden_size is 63, but only 64"),
        (QWEN3, {"deepstack_visual_indexes": [2, 0]}, r"deepstack_visual_indexes is \[2, 0\]"),
        (QWEN3, {"deepstack_visual_indexes": [3]}, "the tower's 3 blocks"),
        (QWEN3, {"deepstack_visual_indexes": [0, 1, 2]}, "fewer than the text model's 3 layers"),
        (QWEN3, {"num_heads": 3}, "num_heads is 3"),
        (QWEN3, {"num_heads": 16}, "heads have 2 channels"),
        (QWEN3, {"in_channels": 4}, "in_channels is 4"),
        (QWEN3, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (QWEN3, {"patch_size": 0}, "patch_size is 0"),
        (QWEN2_5, {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e5}}, "rope_theta"),
        (QWEN2_5, {"fullatt_block_indexes": "all"}, "fullatt_block_indexes"),
        (LLAVA, {"model_type": "siglip_vision_model"}, "model_type is 'siglip_vision_model'"),
        (MISTRAL, {"rope_theta": 1e5}, "rope_theta"),
        (KIMI, {"merge_kernel_size": [2, 1]}, "merge_kernel_size"),
        (KIMI, {"pos_emb_width": 7}, "pos_emb_width is 7"),
        (KIMI, {"mm_projector_type": "mlp"}, "mm_projector_type"),
    ],
)
def test_towers_that_are_refused(family: str, vision: dict[str, Any], told: str) -> None:
    with pytest.raises(ArchError, match=told):
        make_arch(config_of(family, **vision))


@pytest.mark.parametrize(
    ("family", "outer", "told"),
    [
        (QWEN3, {"image_token_id": 384}, "token 384, but the text model has vocab_size=384"),
        (QWEN3, {"vision_config": [1]}, "vision_config"),
        (LLAVA, {"vision_feature_layer": -5}, "vision_feature_layer is -5"),
        (LLAVA, {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        (LLAVA, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        (MISTRAL, {"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        (MISTRAL, {"projector_hidden_act": "silu"}, "projector_hidden_act"),
    ],
)
def test_configs_around_towers_that_are_refused(
    family: str, outer: dict[str, Any], told: str
) -> None:
    with pytest.raises(ArchError, match=told):
        make_arch(config_of(family) | outer)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"do_rescale": False}, "do_rescale"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
    ],
)
def test_image_processors_that_are_refused(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(QWEN3)))
    assert vision_of(read_arch(tmp_path)).mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"rescale_factor": 1 / 255}))
    assert vision_of(read_arch(tmp_path)).mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ArchError, match=told):
        read_arch(tmp_path)
