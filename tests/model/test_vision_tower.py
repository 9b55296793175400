"""Vision towers against transformers in fp32, from pixels on; every weight is random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loaded import load_model
from pictured import processed, processed_videos
from safetensors.torch import load_file, save_file
from tiny_models import load
from torch import Tensor
from vision_models import pictures, save_reference

from gllm_engine.arch import FAMILIES, LoadError, Shard, make_arch, read_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.arch.vision import Vision
from gllm_engine.model import Decoder, VisionTower, fill_randomly, vision_tower
from gllm_engine.model.tiny import write_tiny_model

TOLERANCE = 2e-5
TOWERS = [
    name
    for name in FAMILIES
    if make_arch(tiny_config(name)).vision is not None and not name.startswith("KimiK25")
]
# Pixels: windows of 3 x 3 embeddings that end early below, on the right, on both sides, nowhere.
SIZES = [(56, 48), (24, 80), (8, 16), (48, 24)]
WINDOWED = "Qwen2_5_VLForConditionalGeneration"
LLAVA = "LlavaForConditionalGeneration"
MISTRAL = "Mistral3ForConditionalGeneration"
KIMI = "Kimi_K25ForConditionalGeneration"
DEEP = "Qwen3VLForConditionalGeneration"


def sizes_for(vision: Vision) -> list[tuple[int, int]]:
    """LLaVA takes squares of one size only."""
    side = vision.table * vision.patch
    return [(side, side)] * 2 if vision.has_class else SIZES


def vision_of(path: Path) -> Vision:
    vision = read_arch(path).vision
    assert vision is not None
    return vision


def tower_of(path: Path) -> VisionTower:
    tower = load(path).tower
    assert tower is not None
    return tower


def expected(model: Any, images: list[Tensor], vision: Vision) -> list[Tensor]:
    if not vision.frames:
        return [expected_of_one(model, image, vision) for image in images]
    inputs = processed(images, vision)
    grids = inputs["image_grid_thw"]
    with torch.no_grad():
        found = model.model.visual(inputs["pixel_values"], grid_thw=grids, return_dict=True)
    deep = getattr(found, "deepstack_features", None) or []
    sizes = (grids.prod(1) // vision.merge**2).tolist()
    return list(torch.stack([found.pooler_output, *deep]).split(sizes, 1))


def expected_of_one(model: Any, image: Tensor, vision: Vision) -> Tensor:
    """By a model whose patches have no frames."""
    share = (image.numpy().astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(each, np.float32) for each in (vision.mean, vision.std))
    pixels = torch.from_numpy((share - mean) / std)
    rows, columns = (side // vision.patch for side in image.shape[:2])
    options: dict[str, Any] = {}
    if vision.table and not vision.has_class:  # Kimi's, which takes patches
        patches = pixels.view(rows, vision.patch, columns, vision.patch, 3).permute(0, 2, 4, 1, 3)
        pixels = patches.flatten(0, 1)
        options["image_grid_thw"] = torch.tensor([[1, rows, columns]])
    else:
        pixels = pixels.permute(2, 0, 1)[None]
    if vision.rotary == "shifted":
        options["image_sizes"] = torch.tensor([image.shape[:2]])
    with torch.no_grad():
        found = model.get_image_features(pixels, **options).pooler_output
    return torch.cat(list(found)).view(1, -1, vision.out)


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """As a share of the largest number."""
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    pairs = zip(ours, theirs, strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


@pytest.mark.parametrize("family", [WINDOWED, DEEP, "Qwen3_5ForConditionalGeneration"])
def test_a_video_is_encoded_moment_by_moment(tmp_path: Path, family: str) -> None:
    """Frames of a moment are different ones, and moments do not see each other."""
    model = save_reference(tmp_path, family)
    vision = vision_of(tmp_path)
    videos = [torch.stack(pictures(*[size] * 4)) for size in SIZES[:2]]
    inputs = processed_videos(videos, vision, 1)
    grids = inputs["video_grid_thw"]
    with torch.no_grad():
        found = model.model.visual(inputs["pixel_values_videos"], grid_thw=grids, return_dict=True)
    deep = getattr(found, "deepstack_features", None) or []
    sizes = [size for size in (grids[:, 1:].prod(1) // vision.merge**2).tolist() for _ in range(2)]
    theirs = list(torch.stack([found.pooler_output, *deep]).split(sizes, 1))
    moments = [moment for video in videos for moment in video.split(2)]
    tower = tower_of(tmp_path)
    assert largest_difference(tower.encode(moments), theirs) < TOLERANCE
    turned = [moment.flip(0) for moment in moments]
    assert largest_difference(tower.encode(turned), theirs) > 1e-3


@pytest.mark.parametrize("family", TOWERS)
def test_embeddings_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """The checkpoint is transformers', so no tensor is missing or left over."""
    model = save_reference(tmp_path, family)
    vision = vision_of(tmp_path)
    images = pictures(*sizes_for(vision))
    theirs = expected(model, images, vision)
    assert min(each.std() for each in theirs) > 0.05
    tower = tower_of(tmp_path)
    ours = tower.encode(images)
    assert largest_difference(ours, theirs) < TOLERANCE
    for one, size in zip(ours, sizes_for(vision), strict=True):
        rows, columns = vision.grid(*size)
        assert one.shape == (1 + vision.num_deep, rows * columns, vision.out)
    turned = [image.flip(1) for image in images]
    assert largest_difference(tower.encode(turned), theirs) > 1e-2
    for name, weight in tower.weights().items():
        if vision.rotary is None and name.endswith("k_proj.bias"):
            continue  # adds the same number to all scores of a query
        weight.neg_()
        changed = largest_difference(tower.encode(images[:1]), theirs[:1])
        assert changed > 10 * TOLERANCE, name
        weight.neg_()


@pytest.mark.parametrize(
    ("family", "vision"),
    [
        (LLAVA, {"hidden_act": "gelu", "image_size": 32, "layer_norm_eps": 0.1}),
        (LLAVA, {"model_type": "pixtral", "hidden_act": "silu"}),
        (MISTRAL, {"hidden_act": "gelu", "num_attention_heads": 1}),
        (KIMI, {"merge_kernel_size": [1, 1], "pos_emb_height": 16, "pos_emb_width": 16}),
        (WINDOWED, {"window_size": 8}),
        (WINDOWED, {"fullatt_block_indexes": [0, 2], "window_size": 16, "num_heads": 4}),
        (WINDOWED, {"hidden_act": "gelu", "spatial_merge_size": 1, "window_size": 20}),
        (DEEP, {"deepstack_visual_indexes": [], "num_position_embeddings": 4}),
        (DEEP, {"hidden_act": "gelu", "spatial_merge_size": 4, "temporal_patch_size": 1}),
        (DEEP, {"patch_size": 2, "hidden_size": 48, "num_heads": 1, "num_position_embeddings": 1}),
    ],
)
def test_other_towers(tmp_path: Path, family: str, vision: dict[str, Any]) -> None:
    pixtral = vision.get("model_type") == "pixtral"
    outer = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    model = save_reference(tmp_path, family, outer if pixtral else {}, **vision)
    is_clip = family == LLAVA and not pixtral
    images = pictures((32, 32)) if is_clip else pictures((64, 32), (16, 48))
    theirs = expected(model, images, vision_of(tmp_path))
    assert largest_difference(tower_of(tmp_path).encode(images), theirs) < TOLERANCE


@pytest.mark.parametrize("family", [WINDOWED, DEEP])
def test_patches_are_those_of_transformers_bit_by_bit(family: str) -> None:
    vision = make_arch(tiny_config(family)).vision
    assert vision is not None
    every = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(-1, -1, 3)
    images = [every, *pictures((24, 40))]
    tower = VisionTower(vision, torch.float32, torch.device("cpu"))
    ours = torch.cat([tower._patches(image) for image in images])
    assert torch.equal(ours, processed(images, vision)["pixel_values"])


@pytest.mark.parametrize("family", [WINDOWED, DEEP])
def test_images_together_are_images_alone(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tower_of(write_tiny_model(tmp_path, family))
    images = pictures(*SIZES)
    together = tower.encode(images)
    alone = [tower.encode([image])[0] for image in images]
    assert largest_difference(together, alone) < TOLERANCE
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in together)
    assert tower.encode([]) == []
    passes: list[int] = []
    encode = tower._encode
    monkeypatch.setattr(tower, "_encode", lambda some: passes.append(len(some)) or encode(some))
    monkeypatch.setattr(vision_tower, "_PASS_PATCHES", 168 + 120)
    assert largest_difference(tower.encode(images), alone) < TOLERANCE
    assert passes == [2, 2]
    passes.clear()
    monkeypatch.setattr(vision_tower, "_PASS_PATCHES", 1)
    tower.encode(images)
    assert passes == [1, 1, 1, 1]


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_in_bfloat16(tmp_path: Path, family: str) -> None:
    write_tiny_model(tmp_path, family)
    arch = read_arch(tmp_path)
    options: dict[str, Any] = {"device": torch.device("cpu"), "max_model_len": 8}
    narrow = load_model(tmp_path, arch, dtype=torch.bfloat16, **options).tower
    wide = load_model(tmp_path, arch, dtype=torch.float32, **options).tower
    assert narrow is not None and wide is not None
    images = pictures(*sizes_for(narrow.vision))
    for one, other in zip(narrow.encode(images), wide.encode(images), strict=True):
        assert one.dtype == torch.bfloat16
        likeness = torch.cosine_similarity(one.float(), other, dim=-1)
        assert 0.99 < likeness.min() and one.float().std() > 0.1


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_checkpoints_own_mean_and_deviation(tmp_path: Path, file: str) -> None:
    model = save_reference(tmp_path, DEEP)
    own = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "do_normalize": True}
    content = own if file.startswith("pre") else {"image_processor": own}
    (tmp_path / file).write_text(json.dumps(content))
    vision = vision_of(tmp_path)
    assert vision.mean == (0.4, 0.5, 0.6) and vision.std == (0.2, 0.3, 0.25)
    images = pictures((16, 24))
    found = tower_of(tmp_path).encode(images)
    assert largest_difference(found, expected(model, images, vision)) < TOLERANCE


@pytest.mark.parametrize("family", [name for name in TOWERS if name.startswith("Qwen")])
def test_older_names_of_the_same_tensors(tmp_path: Path, family: str) -> None:
    write_tiny_model(tmp_path, family)
    images = pictures((16, 24))
    before = tower_of(tmp_path).encode(images)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert any(name.startswith("model.visual.") for name in tensors)
    older = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
    }
    save_file(older, file)
    assert torch.equal(tower_of(tmp_path).encode(images)[0], before[0])


@pytest.mark.parametrize("family", [WINDOWED, DEEP])
def test_a_missing_or_left_over_tensor_of_a_tower(tmp_path: Path, family: str) -> None:
    write_tiny_model(tmp_path, family)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.visual.blocks.1.attn.proj.bias"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(LoadError, match=f"tensor {name} is missing"):
        load(tmp_path)
    save_file(tensors | {"model.visual.blocks.3.norm1.weight": torch.ones(32)}, file)
    with pytest.raises(LoadError, match=r"visual.blocks.3.norm1.weight is left over"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).tower is None  # and no tensor is left over


def test_only_the_first_stage_has_a_tower_and_all_of_its_ranks_have_it_whole() -> None:
    arch = make_arch(tiny_config(DEEP))
    assert arch.vision is not None
    for first, end in ((0, 1), (1, 2)):
        for rank in (0, 1):
            shard = Shard(first, end, rank, 2)
            held = {n: s for n, s in shard.weights(arch).items() if n.startswith("visual.")}
            assert held == (arch.vision.weights() if first == 0 else {})
    options: dict[str, Any] = {"dtype": torch.float32, "max_model_len": 8}
    last = Decoder(arch, shard=Shard(1, 2), device=torch.device("cpu"), **options)
    assert last.tower is None and not any(n.startswith("visual.") for n in last.weights())
    first_stage = Decoder(arch, shard=Shard(0, 1), device=torch.device("cpu"), **options)
    assert first_stage.tower is not None
    assert first_stage.tower.weights().keys() == arch.vision.weights().keys()
    fill_randomly(first_stage)
    found = first_stage.tower.encode(pictures((16, 24)))[0]
    assert found.isfinite().all() and found.std() > 0
