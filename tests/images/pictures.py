"""Pictures and checkpoints for the tests of images."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gllm_engine.arch.tiny import tiny_config
from gllm_engine.config import EngineConfig
from gllm_engine.images import ImageProcessor, read_processor

# The model types: a family, and what real checkpoints have in the place of a tiny one's values.
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": ("Qwen2_5_VL", {"image_token_id": 7}, {"patch_size": 14}),
    "qwen3_vl": ("Qwen3VL", {"image_token_id": 7}, {"patch_size": 16}),
    "qwen3_5_moe": ("Qwen3_5Moe", {"image_token_id": 7}, {"patch_size": 16}),
    "llava": ("Llava", {"image_token_index": 7}, {"image_size": 336, "patch_size": 14}),
    "mistral3": (
        "Mistral3",
        {"image_token_index": 7, "spatial_merge_size": 2},
        {"image_size": 1540, "patch_size": 14},
    ),
    "kimi_k25": ("KimiK25", {"media_placeholder_token_id": 7}, {"patch_size": 14}),
}


def checkpoint(
    path: Path,
    model_type: Any,
    settings: object = None,
    vision: dict[str, Any] | None = None,
    **config: object,
) -> Path:
    """Write config.json and, with `settings`, preprocessor_config.json into directory `path`.

    `vision`, `config`: values in the place of others.
    """
    values: dict[str, Any] = {"model_type": model_type}
    if model_type in CONFIGS:
        family, outer, tower = CONFIGS[model_type]
        values = tiny_config(f"{family}ForConditionalGeneration")
        values |= outer | {"vision_config": values["vision_config"] | tower | (vision or {})}
    (path / "config.json").write_text(json.dumps(values | config))
    if settings is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def read(path: Path, **options: Any) -> ImageProcessor | None:
    """The image processor of a checkpoint, with options of EngineConfig."""
    return read_processor(EngineConfig(model=str(path), **options))


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture of coarse noise, which resampling does not turn to grey."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (height // 3 + 2, width // 3 + 2, 4), np.uint8)
    image = Image.fromarray(small, "RGBA").resize((width, height))
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
