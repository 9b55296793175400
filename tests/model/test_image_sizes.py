"""Images of every size that a request may have."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictured import request

from gllm_engine.arch import FAMILIES, Model, make_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.engine.check_images import check_images
from gllm_engine.model import VisionTower

SEEING = [name for name in FAMILIES if make_arch(tiny_config(name)).vision is not None]
# Rows and columns of embeddings: any, strips of one, and those around the edges of windows.
shapes = st.one_of(
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(st.just(1), st.integers(1, 600)),
    st.tuples(st.integers(1, 600), st.just(1)),
    st.tuples(st.sampled_from([2, 3, 4, 6, 7]), st.integers(1, 60)),
)


@cache
def tower_of(family: str) -> tuple[Model, VisionTower]:
    arch = make_arch(tiny_config(family))
    assert arch.vision is not None
    tower = VisionTower(arch.vision, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for weight in tower.weights().values():
        weight.normal_(0, 0.1, generator=generator)
    return arch, tower


@pytest.mark.parametrize("family", SEEING)
@given(sizes=st.lists(shapes, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None, derandomize=True)
@torch.inference_mode()
def test_no_image_that_is_taken_fails_in_the_tower(
    family: str, sizes: list[tuple[int, int]]
) -> None:
    """So nobody can fail a step, which others share, by an odd image: check_images refuses every
    size that a tower could not take, whichever front end sends it, and the others are encoded.
    """
    arch, tower = tower_of(family)
    asked = request(tower.vision, *((str(i), *size) for i, size in enumerate(sizes)), 1)
    check_images(asked, arch)
    images = [
        torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(
            image.height, image.width, 3
        )
        for image in asked.images
    ]
    for found, (rows, columns) in zip(tower.encode(images), sizes, strict=True):
        assert found.shape == (1 + tower.vision.num_deep, rows * columns, tower.vision.out)
        assert found.isfinite().all()
