"""Pictures and checkpoints for the tests of images."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

# The model types, with the least of a config.json that real checkpoints of them have.
CONFIGS = {
    "qwen2_5_vl": {"image_token_id": 7, "vision_config": {"patch_size": 14}},
    "qwen3_vl": {"image_token_id": 7, "vision_config": {"patch_size": 16}},
    "qwen3_5_moe": {"image_token_id": 7, "vision_config": {"patch_size": 16}},
    "llava": {"image_token_index": 7, "vision_config": {"image_size": 336, "patch_size": 14}},
    "mistral3": {
        "image_token_index": 7,
        "spatial_merge_size": 2,
        "vision_config": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
    },
    "kimi_k25": {"media_placeholder_token_id": 7, "vision_config": {"patch_size": 14}},
}


def checkpoint(path: Path, model_type: str, settings: object = None, **config: object) -> Path:
    """Write config.json and, with `settings`, preprocessor_config.json into directory `path`."""
    values = {"model_type": model_type} | CONFIGS.get(model_type, {}) | config
    (path / "config.json").write_text(json.dumps(values))
    if settings is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


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
