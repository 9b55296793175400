"""Reads how a checkpoint wants its images, by the `model_type` in its config.json.

Without a file of settings, a family's settings are those of its class in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from gllm_engine.config import ConfigError
from gllm_engine.files import read_object, shown
from gllm_engine.images.processor import BICUBIC, ImageProcessor
from gllm_engine.images.resize import MAX_SIDE, CenterCrop, LongestEdge, Padded, PixelRange, Rule

MAX_NUMBER = 2**30  # for loops over such numbers
PLACEHOLDER_KEYS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
# Their ids in Mistral's vocabularies, for a checkpoint without a tokenizer.json.
BREAKS = {"[IMG_BREAK]": 12, "[IMG_END]": 13}

Values = dict[str, Any]


def read_processor(
    path: Path,
    max_pixels: int | None = None,
    *,
    max_mib: int = 32,
    max_megapixels: int = 100,
    tokenizer: Path | None = None,
) -> ImageProcessor | None:
    """The image processor of the checkpoint in directory `path`, None if it takes no images.

    `max_pixels` lowers the number of pixels to which images are resized. `max_mib` and
    `max_megapixels` limit files. `tokenizer`: its directory, if that is another one. Raises
    ConfigError with a sentence for settings that are wrong or not supported.
    """
    config = read_object(path / "config.json", ConfigError)
    family = _FAMILIES.get(str(config.get("model_type")))
    vision = config.get("vision_config")
    if family is None or not isinstance(vision, dict):
        return None
    read_rule, placeholder = family
    checkpoint = _Checkpoint(path, config, vision, _settings(path), max_pixels)
    checkpoint.require(do_resize=True, resample=BICUBIC)
    rule = read_rule(checkpoint)
    breaks = isinstance(rule, LongestEdge)
    return ImageProcessor(
        rule=rule,
        placeholder=checkpoint.number(config, PLACEHOLDER_KEYS, placeholder),
        breaks=_breaks((tokenizer or path) / "tokenizer.json") if breaks else None,
        max_bytes=max_mib << 20,
        max_pixels=max_megapixels * 10**6,
    )


@dataclass(frozen=True)
class _Checkpoint:
    path: Path
    config: Values
    vision: Values
    settings: Values  # of the image processor
    max_pixels: int | None

    def number(self, values: Values, keys: tuple[str, ...], default: int) -> int:
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

    def section(self, name: str, *keys: str) -> Values:
        """An object in the settings, {} without it. A number stands for the first of `keys`.

        With `keys`, no other keys have a value.
        """
        section = self.settings.get(name) or {}
        if keys and isinstance(section, int):
            return {keys[0]: section}
        if not isinstance(section, dict):
            raise ConfigError(f"{self.path}: {name}: {shown(section)} is not an object")
        if keys and any(section[key] is not None for key in section.keys() - set(keys)):
            raise ConfigError(f"{self.path}: {name}: {shown(section)} has keys beside {keys}")
        return section

    def require(self, **expected: object) -> None:
        for key, value in expected.items():
            found = self.settings.get(key)
            if found is not None and found != value:
                raise ConfigError(
                    f"{self.path}: {key}: {shown(found)} is not supported for images, only {value}"
                )

    def limit(self, least: int) -> int:
        """The configuration's limit of pixels, which may not be below `least`."""
        if self.max_pixels is not None and self.max_pixels < least:
            raise ConfigError(
                f"image_max_pixels: {self.max_pixels} is below {least}, the least that images of "
                "this model may be limited to"
            )
        return self.max_pixels or MAX_NUMBER


def _settings(path: Path) -> Values:
    combined = path / "processor_config.json"
    if combined.exists():
        settings = read_object(combined, ConfigError).get("image_processor")
        if isinstance(settings, dict):
            return settings
    file = path / "preprocessor_config.json"
    return read_object(file, ConfigError) if file.exists() else {}


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


def _qwen(checkpoint: _Checkpoint, patch: int, least: int, most: int) -> Rule:
    vision = checkpoint.vision
    patch = checkpoint.number(vision, ("patch_size",), patch)
    factor = patch * checkpoint.number(vision, ("spatial_merge_size",), 2)
    settings = checkpoint.section("size", "shortest_edge", "longest_edge") | checkpoint.settings
    least = checkpoint.number(settings, ("min_pixels", "shortest_edge"), least)
    most = checkpoint.number(settings, ("max_pixels", "longest_edge"), most)
    if most < max(least, factor**2):
        raise ConfigError(
            f"{checkpoint.path}: max_pixels: {most} is less than min_pixels or one embedding's"
        )
    return PixelRange(factor, least, min(most, checkpoint.limit(max(least, factor**2))))


def _qwen_14(checkpoint: _Checkpoint) -> Rule:
    return _qwen(checkpoint, patch=14, least=56 * 56, most=28 * 28 * 1280)


def _qwen_16(checkpoint: _Checkpoint) -> Rule:
    return _qwen(checkpoint, patch=16, least=256 * 256, most=4096 * 4096)


def _llava(checkpoint: _Checkpoint) -> Rule:
    if checkpoint.vision.get("model_type") == "pixtral":
        return _pixtral(checkpoint, merge=1)
    checkpoint.require(do_center_crop=True, do_pad=False)
    side = checkpoint.number(checkpoint.vision, ("image_size",), 224)
    edge = checkpoint.number(checkpoint.section("size", "shortest_edge"), ("shortest_edge",), side)
    if checkpoint.number(checkpoint.settings, ("crop_size",), side) != side:
        raise ConfigError(f"{checkpoint.path}: crop_size: images of the tower have {side}")
    checkpoint.limit(side**2)
    return CenterCrop(checkpoint.number(checkpoint.vision, ("patch_size",), 32), edge, side)


def _mistral(checkpoint: _Checkpoint) -> Rule:
    return _pixtral(checkpoint, checkpoint.number(checkpoint.config, ("spatial_merge_size",), 2))


def _pixtral(checkpoint: _Checkpoint, merge: int) -> Rule:
    factor = checkpoint.number(checkpoint.vision, ("patch_size",), 16) * merge
    edge = checkpoint.number(checkpoint.section("size", "longest_edge"), ("longest_edge",), 1024)
    # The tower has positions for images of this size.
    most = checkpoint.number(checkpoint.vision, ("image_size",), 1024)
    most = min(most, isqrt(checkpoint.limit(factor**2)))
    return LongestEdge(factor, min(edge, max(factor, most // factor * factor)))


def _kimi(checkpoint: _Checkpoint) -> Rule:
    # Moonshot's own files nest the settings, with names of their own.
    settings = checkpoint.settings | checkpoint.section("media_proc_cfg")
    settings |= checkpoint.section("size", "max_height", "max_width")
    patch = checkpoint.number(checkpoint.vision, ("patch_size",), 14)
    factor = patch * checkpoint.number(checkpoint.vision, ("merge_kernel_size",), 2)
    patches = checkpoint.number(settings, ("in_patch_limit", "max_patches"), 16384)
    side = checkpoint.number(settings, ("patch_limit_on_one_side", "max_height"), 512)
    patches = min(patches, checkpoint.limit(factor**2) // patch**2)
    return Padded(factor, patch, patches, min(side, MAX_SIDE // patch))


# By model_type: the rule's reader, and the default id of the placeholder.
_FAMILIES: dict[str, tuple[Callable[[_Checkpoint], Rule], int]] = {
    "qwen2_5_vl": (_qwen_14, 151655),
    "qwen3_vl": (_qwen_16, 151655),
    "qwen3_vl_moe": (_qwen_16, 151655),
    "qwen3_5": (_qwen_16, 248056),
    "qwen3_5_moe": (_qwen_16, 248056),
    "llava": (_llava, 32000),
    "mistral3": (_mistral, 10),
    "kimi_k25": (_kimi, 163605),
}
