"""Images that no front end of ours sends are refused, each with a sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
from msgspec.structs import replace
from pictured import request

from gllm_engine.arch import make_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.engine.check_images import check_images
from gllm_engine.sampling import InvalidField
from gllm_engine.types import Image

ARCH = make_arch(tiny_config("Qwen3VLForConditionalGeneration"))
GOOD = request(ARCH.vision, 3, ("a", 2, 3), 1, ("b", 1, 1), 2)  # type: ignore[arg-type]


def refusal(*images: Image, arch: Any = ARCH) -> str:
    with pytest.raises(InvalidField) as caught:
        check_images(replace(GOOD, images=images), arch)
    assert str(caught.value).startswith("image: ")
    return str(caught.value)


def test_what_fits_is_taken() -> None:
    check_images(GOOD, ARCH)
    check_images(replace(GOOD, images=()), make_arch(tiny_config("LlamaForCausalLM")))


def test_a_model_of_text_takes_none() -> None:
    text = make_arch(tiny_config("LlamaForCausalLM"))
    assert refusal(*GOOD.images, arch=text) == "image: this model takes no images"


SPACED = make_arch(tiny_config("Qwen2_5_VLForConditionalGeneration"))
MOMENTS = request(SPACED.vision, 3, ("a", 2, 3, 2), 1)  # type: ignore[arg-type]


def test_a_moment_follows_another_one() -> None:
    check_images(MOMENTS, SPACED)
    first, second = MOMENTS.images
    for bad in (
        replace(second, time=2**31),
        replace(second, time=-1),
        replace(second, first=second.first + 1),
    ):
        with pytest.raises(InvalidField, match=r"number 1: its time is -?\d+, but times from 0 to"):
            check_images(replace(MOMENTS, images=(first, bad)), SPACED)
    with pytest.raises(InvalidField, match="number 0: its time is 0"):
        check_images(replace(MOMENTS, images=(replace(first, time=0), second)), SPACED)
    three = replace(first, pixels=first.pixels + first.pixels[: len(first.pixels) // 2])
    with pytest.raises(InvalidField, match="number 0: it has .* bytes"):
        check_images(replace(MOMENTS, images=(three, second)), SPACED)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"first": -1}, "takes tokens -1 to 4, but only tokens 0 to 12 are left"),
        ({"first": 7}, "number 1: it takes tokens 10 to 10, but only tokens 13 to 12 are left"),
        ({"first": 8}, "takes tokens 8 to 13"),
        ({"first": 2**62}, "takes tokens"),
        ({"height": 8}, r"rows and columns, \(1, 3\) are needed"),
        ({"height": 15}, "whole multiples of 8 are needed"),
        ({"height": 0}, "whole multiples of 8 are needed"),
        ({"width": -24}, "whole multiples of 8 are needed"),
        ({"width": 2**40}, r"bytes, three for each of \(16, 1099511627776\) pixels"),
        ({"rows": 3, "columns": 2}, r"it has \(3, 2\) rows and columns, \(2, 3\) are needed"),
        ({"stride": 4}, "its rows are 4 tokens apart, 3 are needed"),
        ({"stride": 2}, "its rows are 2 tokens apart, 3 are needed"),
        ({"digest": b"short"}, "its digest has 5 bytes, 16 are needed"),
        ({"pixels": b""}, "it has 0 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], problem: str) -> None:
    if "height" in changes:
        changes = changes | {"pixels": bytes(max(0, 3 * changes["height"] * 24))}
    assert re.search(problem, refusal(replace(GOOD.images[0], **changes), GOOD.images[1]))
