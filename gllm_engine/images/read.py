"""Reads how a checkpoint wants its images and videos, by the `model_type` in its config.json. What
is known of its vision tower is read in arch alone.

Without a file of settings, a family's settings are those of its class in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

from gllm_engine.arch import Vision, read_arch
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.files import read_object, shown
from gllm_engine.images.processor import ImageProcessor
from gllm_engine.images.resize import (
    BICUBIC,
    MAX_SIDE,
    CenterCrop,
    LongestEdge,
    Padded,
    PixelRange,
    Rule,
)
from gllm_engine.images.video import VideoProcessor
from gllm_engine.images.video_rule import Spaced, Stamped

MAX_NUMBER = 2**30  # for loops over such numbers
# Their ids in Mistral's vocabularies, for a checkpoint without a tokenizer.json.
BREAKS = {"[IMG_BREAK]": 12, "[IMG_END]": 13}

Values = dict[str, Any]


def read_processor(config: EngineConfig) -> ImageProcessor | None:
    """The image processor of the configured model, None if it takes no images. Raises ConfigError
    or ArchError with a sentence for settings that are wrong or not supported.
    """
    path = Path(config.model)
    values = read_object(path / "config.json", ConfigError)
    read_rule = _RULES.get(str(values.get("model_type")))
    if read_rule is None or not isinstance(values.get("vision_config"), dict):
        return None
    arch = read_arch(path)
    tower = arch.vision
    if tower is None:
        return None
    settings = _settings(path, "image")
    most = config.image_max_pixels
    checkpoint = _Checkpoint(path, values["vision_config"], tower, arch.vocab, settings, most)
    checkpoint.require(do_resize=True, resample=BICUBIC, height=None, width=None)
    rule = read_rule(checkpoint)
    breaks = isinstance(rule, LongestEdge)
    return ImageProcessor(
        rule=rule,
        placeholder=tower.image_token,
        breaks=_breaks(Path(config.tokenizer or path) / "tokenizer.json") if breaks else None,
        max_bytes=config.max_image_mib << 20,
        max_pixels=config.max_image_megapixels * 10**6,
        videos=_videos(checkpoint, values, config),
    )


@dataclass(frozen=True)
class _Checkpoint:
    path: Path
    vision: Values
    tower: Vision
    vocab: int
    settings: Values  # of the image processor, those in `size` among them
    max_pixels: int | None

    def number(self, values: Values, default: int, *keys: str) -> int:
        """The first of `keys` that has a value: a number, or several equal ones."""
        key = next((key for key in keys if values.get(key) is not None), None)
        if key is None:
            return default
        value = values[key]
        numbers = list(value.values()) if isinstance(value, dict) else value
        if isinstance(numbers, list) and numbers and numbers.count(numbers[0]) == len(numbers):
            numbers = numbers[0]
        if type(numbers) is not int or not 0 < numbers <= MAX_NUMBER:
            raise ConfigError(f"{self.path}: {key}: {shown(value)} is outside [1, {MAX_NUMBER}]")
        return numbers

    def token(self, config: Values, default: int, key: str) -> int:
        id = self.number(config, default, key)
        if id >= self.vocab:
            raise ConfigError(
                f"{self.path}: {key}: {id} is no token, the text model has vocab_size={self.vocab}"
            )
        return id

    @property
    def factor(self) -> int:
        """Pixels of an embedding's side."""
        return self.tower.patch * self.tower.merge

    def require(self, **expected: object) -> None:
        for key, value in expected.items():
            found = self.settings.get(key)
            if found is not None and found != value:
                raise ConfigError(
                    f"{self.path}: {key}: {shown(found)} is not supported, only {value}"
                )

    def limit(self, least: int) -> int:
        """The configuration's limit of pixels, which may not be below `least`."""
        if self.max_pixels is not None and self.max_pixels < least:
            raise ConfigError(
                f"image_max_pixels: {self.max_pixels} is below {least}, the least that images of "
                "this model may be limited to"
            )
        return self.max_pixels or MAX_NUMBER


def _settings(path: Path, kind: str) -> Values:
    """Of the image or the video processor."""
    settings = None
    if (path / "processor_config.json").exists():
        settings = read_object(path / "processor_config.json", ConfigError).get(f"{kind}_processor")
    if not isinstance(settings, dict):
        prefix = "" if kind == "image" else "video_"
        file = path / f"{prefix}preprocessor_config.json"
        settings = read_object(file, ConfigError) if file.exists() else {}
    # The second one is of Moonshot's own files.
    for name in ("size", "media_proc_cfg"):
        if isinstance(settings.get(name), dict):
            settings = settings.pop(name) | settings
    return settings


def _breaks(file: Path) -> tuple[int, int]:
    """The ids of [IMG_BREAK] and [IMG_END] in a tokenizer.json."""
    ids: Values = BREAKS
    if file.exists():
        added = read_object(file, ConfigError).get("added_tokens")
        tokens = [token for token in added or () if isinstance(token, dict)]
        ids = {str(token.get("content")): token.get("id") for token in tokens}
    row, last = (ids.get(name) for name in BREAKS)
    if type(row) is not int or type(last) is not int:
        raise ConfigError(f"{file}: one of the tokens {', '.join(BREAKS)} is missing")
    return row, last


def _qwen(checkpoint: _Checkpoint, least: int, most: int) -> Rule:
    factor = checkpoint.factor
    least = checkpoint.number(checkpoint.settings, least, "min_pixels", "shortest_edge")
    most = checkpoint.number(checkpoint.settings, most, "max_pixels", "longest_edge")
    return PixelRange(factor, least, min(most, checkpoint.limit(max(least, factor**2))))


def _videos(checkpoint: _Checkpoint, values: Values, config: EngineConfig) -> VideoProcessor | None:
    """The video processor; None for a family that takes no videos.

    Without ids in config.json, placeholders have those beside that of images.
    """
    kind = _VIDEOS.get(values["model_type"])
    if kind is None:
        return None
    tower = checkpoint.tower
    images = checkpoint.settings
    own = replace(checkpoint, settings=_settings(checkpoint.path, "video"))
    own.require(do_resize=True, resample=BICUBIC, num_frames=None, temporal_patch_size=2)
    # The tower knows one mean and one deviation.
    same = {key: images[key] for key in ("image_mean", "image_std") if key in images}
    own.require(patch_size=tower.patch, merge_size=tower.merge, **same)
    start = own.token(values, tower.image_token - 3, "vision_start_token_id")
    end = own.token(values, tower.image_token - 2, "vision_end_token_id")
    placeholder = own.token(values, tower.image_token + 1, "video_token_id")
    if placeholder == tower.image_token:
        raise ConfigError(
            f"{own.path}: video_token_id: {placeholder} is the placeholder of images too"
        )
    return VideoProcessor(
        rule=_video_rule(own, kind, config.max_video_frames),
        placeholder=placeholder,
        around=(start, end),
        max_bytes=config.max_video_mib << 20,
        max_pixels=config.max_video_megapixels * 10**6,
        seconds=config.video_decode_s,
    )


def _video_rule(
    own: _Checkpoint, kind: type[Spaced | Stamped], max_frames: int | None
) -> Spaced | Stamped:
    area = own.factor**2
    fps = own.settings.get("fps") or 2
    if not isinstance(fps, int | float) or not 0 < fps <= MAX_NUMBER:
        raise ConfigError(f"{own.path}: fps: {shown(fps)} is outside (0, {MAX_NUMBER}]")
    most = own.number(own.settings, 768, "max_frames")
    tokens = own.number(own.settings, 128_000 if kind is Spaced else 768, "max_video_tokens")
    is_capped = own.settings.get("cap_pixels_per_frame") is not False
    rule: dict[str, Any] = {
        "factor": own.factor,
        "least": own.number(own.settings, 128 * area, "min_pixels", "shortest_edge"),
        "most": own.number(own.settings, 768 * area, "max_pixels", "longest_edge"),
        "frame_most": own.limit(area),
        "fps": float(fps),
        "min_frames": own.number(own.settings, 4, "min_frames"),
        "max_frames": min(most, max_frames or most),
    }
    if kind is Stamped:
        return Stamped(**rule, cap=is_capped * tokens * area)
    rate = own.number(own.vision, 4, "tokens_per_second")
    return Spaced(**rule, cap=is_capped * int(tokens * area * 0.9), positions_per_s=rate)


def _llava(checkpoint: _Checkpoint) -> Rule:
    if not checkpoint.tower.table:
        return _pixtral(checkpoint)
    side = checkpoint.factor * checkpoint.tower.table
    edge = checkpoint.number(checkpoint.settings, side, "shortest_edge", "size")
    crop = checkpoint.number(checkpoint.settings, side, "crop_size")
    if crop != side:
        raise ConfigError(f"crop_size: {crop} is not the {side} of the tower's images")
    checkpoint.require(do_center_crop=True, do_pad=False)
    checkpoint.limit(side**2)
    return CenterCrop(checkpoint.factor, edge, side)


def _pixtral(checkpoint: _Checkpoint) -> Rule:
    factor = checkpoint.factor
    edge = checkpoint.number(checkpoint.settings, 1024, "longest_edge", "size")
    # The tower has positions for images of this size.
    most = checkpoint.number(checkpoint.vision, 1024, "image_size")
    most = min(most, isqrt(checkpoint.limit(factor**2)))
    return LongestEdge(factor, min(edge, max(factor, most // factor * factor)))


def _kimi(checkpoint: _Checkpoint) -> Rule:
    patch = checkpoint.tower.patch
    factor = checkpoint.factor
    patches = checkpoint.number(checkpoint.settings, 16384, "in_patch_limit", "max_patches")
    patches = min(patches, checkpoint.limit(factor**2) // patch**2)
    side = checkpoint.number(checkpoint.settings, 512, "patch_limit_on_one_side", "max_height")
    return Padded(factor, patch, patches, min(side, MAX_SIDE // patch))


_QWEN3 = partial(_qwen, least=256 * 256, most=4096 * 4096)
_RULES: dict[str, Callable[[_Checkpoint], Rule]] = {
    "qwen2_5_vl": partial(_qwen, least=56 * 56, most=28 * 28 * 1280),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "llava": _llava,
    "mistral3": _pixtral,
    "kimi_k25": _kimi,
}
_VIDEOS: dict[str, type[Spaced | Stamped]] = {
    "qwen2_5_vl": Spaced,
    "qwen3_vl": Stamped,
    "qwen3_vl_moe": Stamped,
    "qwen3_5": Stamped,
    "qwen3_5_moe": Stamped,
}
