"""Rotary positions of prompts with images are those of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from gllm_engine.sched.rotary import RotaryPositions
from gllm_engine.types import Image

TEXT = 1
PLACEHOLDER = 9


def picture(first: int, rows: int, columns: int) -> Image:
    return Image(bytes(16), first, rows, columns, columns, 28 * rows, 28 * columns, b"")


def layout(*parts: int | tuple[int, int]) -> tuple[list[int], list[Image]]:
    """A prompt of so many tokens of text, or of images of (rows, columns)."""
    prompt: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, int):
            prompt += [TEXT] * part
        else:
            images.append(picture(len(prompt), *part))
            prompt += [PLACEHOLDER] * (part[0] * part[1])
    return prompt, images


def unpacked(data: bytes) -> Any:
    return np.frombuffer(data, np.int32).reshape(3, -1)


LAYOUTS = [
    layout(5),
    layout(2, (2, 3), 4),
    layout((5, 1), 1, (1, 7), 3, (4, 4)),
    layout(1, (3, 2), 1, (3, 2), 6),
]


@pytest.mark.parametrize("model", ["qwen2_5_vl.Qwen2_5_VLModel", "qwen3_vl.Qwen3VLModel"])
@pytest.mark.parametrize(("prompt", "images"), LAYOUTS)
def test_positions_equal_transformers(model: str, prompt: list[int], images: list[Image]) -> None:
    import importlib

    family, name = model.split(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(module, name)
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stand_in.get_vision_position_ids = lambda *a, **k: kind.get_vision_position_ids(
        stand_in, *a, **k
    )
    ids = torch.tensor([prompt])
    grids = torch.tensor([[1, 2 * image.rows, 2 * image.columns] for image in images])
    expected, delta = kind.get_rope_index(
        stand_in,
        ids,
        mm_token_type_ids=(ids == PLACEHOLDER).int(),
        image_grid_thw=grids if images else None,
    )
    found = RotaryPositions(len(prompt), images)
    assert found.offset == int(delta)
    assert unpacked(found.packed(0, len(prompt))).tolist() == expected[:, 0].tolist()


def film(first: int, moments: int, rows: int, columns: int, interval: float) -> list[Image]:
    """A video of so many moments of `interval` positions of time, one behind the other."""
    size = rows * columns
    whole = [picture(first + size * number, rows, columns) for number in range(moments)]
    times = [None, *(int(number * interval) for number in range(1, moments))]
    return [replace(moment, time=time) for moment, time in zip(whole, times, strict=True)]


@pytest.mark.parametrize(
    ("moments", "rows", "columns", "interval"),
    [
        (3, 2, 6, 2.0),
        (4, 5, 3, 0.5),
        (2, 1, 2, 1.0),
        (1, 2, 2, 2.0),
        (5, 2, 3, 2.6),
        (3, 1, 2, 90.0),
    ],
)
def test_videos_have_the_positions_of_transformers(
    moments: int, rows: int, columns: int, interval: float
) -> None:
    """But for the text after a video whose time goes further than its rows and columns: that is at
    the next position after all, as with the authors' code and with transformers before version 5.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    size = moments * rows * columns
    images = [picture(1, 3, 1), *film(6, moments, rows, columns, interval)]
    images.append(picture(8 + size, 1, 2))
    prompt_len = 13 + size
    found = unpacked(RotaryPositions(prompt_len, images).packed(0, prompt_len + 2))
    start = found[0, 5] + 1
    grid = torch.tensor([moments, rows, columns])
    theirs = Qwen2_5_VLModel.get_vision_position_ids(None, int(start), grid, 1, 1, interval)
    assert found[:, 6 : 6 + size].tolist() == theirs.tolist()
    last = theirs.max() + 1
    assert found[:, 6 + size].tolist() == [last] * 3
    assert found[:, -1].tolist() == [last + 8] * 3  # the picture after it takes two


@pytest.mark.parametrize(("prompt", "images"), LAYOUTS)
def test_parts_of_a_sequence_are_cut_from_the_whole(prompt: list[int], images: list[Image]) -> None:
    found = RotaryPositions(len(prompt), images)
    length = len(prompt) + 3
    whole = unpacked(found.packed(0, length))
    after = np.arange(len(prompt), length) + found.offset
    assert (whole[:, len(prompt) :] == after).all()
    for start in range(length):
        for end in range(start + 1, length + 1):
            assert (unpacked(found.packed(start, end)) == whole[:, start:end]).all()
