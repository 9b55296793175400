"""Placing images in prompts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pictures import checkpoint, read

from gllm_engine.images import ImageProcessor, PreparedImage, place
from gllm_engine.sampling import InvalidField
from gllm_engine.types import Image


def prepared(rows: int, columns: int, stride: int, name: bytes = b"x") -> PreparedImage:
    return PreparedImage(name * 16, 0, rows, columns, stride, rows * 28, columns * 28, name * 3)


def reader(path: Path, model_type: str) -> ImageProcessor:
    return read(checkpoint(path, model_type))


def test_a_placeholder_becomes_a_token_for_each_embedding(tmp_path: Path) -> None:
    images = [prepared(2, 3, 3, b"a"), prepared(1, 2, 2, b"b")]
    ids, placed = place(reader(tmp_path, "qwen2_5_vl"), [7, 1, 2, 7, 3], images)
    assert ids == [7] * 6 + [1, 2] + [7] * 2 + [3]
    assert placed == (
        Image(b"a" * 16, 0, 2, 3, 3, 56, 84, b"aaa"),
        Image(b"b" * 16, 8, 1, 2, 2, 28, 56, b"bbb"),
    )


def test_mistral_has_tokens_between_rows_and_after_the_last(tmp_path: Path) -> None:
    ids, (image,) = place(reader(tmp_path, "mistral3"), [1, 7, 2], [prepared(2, 3, 4)])
    assert ids == [1, 7, 7, 7, 12, 7, 7, 7, 13, 2]
    embeddings = {image.first + row * image.stride + c for row in range(2) for c in range(3)}
    assert embeddings == {at for at, token in enumerate(ids) if token == 7}
    ids, _ = place(reader(tmp_path, "mistral3"), [7], [prepared(1, 1, 2)])
    assert ids == [7, 13]


@pytest.mark.parametrize(("marks", "images"), [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_each_image_has_one_placeholder(tmp_path: Path, marks: int, images: int) -> None:
    with pytest.raises(
        InvalidField, match=rf"image: the prompt has {marks} placeholders .* for {images} images"
    ):
        place(reader(tmp_path, "llava"), [1] + [7] * marks, [prepared(1, 1, 1)] * images)


def test_a_prompt_without_images_stays_as_it_is(tmp_path: Path) -> None:
    assert place(reader(tmp_path, "llava"), (1, 2), []) == ([1, 2], ())


def test_a_thousand_images_take_linear_time(tmp_path: Path) -> None:
    images = [prepared(16, 16, 16)] * 1000
    started = time.process_time()
    ids, placed = place(reader(tmp_path, "qwen3_vl"), [1, 7, 2] * 1000, images)
    assert time.process_time() - started < 1  # 0.01 s; quadratic takes minutes
    assert (len(ids), placed[-1].first) == (258_000, 258_000 - 257)
