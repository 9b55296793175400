"""Resizing in bands on several threads: bit for bit Pillow's resize of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from threading import Event

import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, noise

from gllm_engine.images import ImageProcessor, pixels
from gllm_engine.images.resize import BICUBIC, CenterCrop, LongestEdge, Padded, PixelRange
from gllm_engine.images.spread import SpreadPool

SIDES = st.integers(1, 90)


@pytest.fixture(scope="module")
def pool() -> Iterator[SpreadPool]:
    with SpreadPool(3) as pool:
        yield pool


@pytest.fixture(autouse=True)
def narrow_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "BAND", 7)


@settings(max_examples=400, deadline=None)
@given(old=st.tuples(SIDES, SIDES), new=st.tuples(SIDES, SIDES))
def test_bands_equal_the_whole(
    pool: SpreadPool, old: tuple[int, int], new: tuple[int, int]
) -> None:
    image = noise(*old, seed=sum(old))
    found = pixels.resized(image, new, pool)
    assert found.tobytes() == image.resize(new, BICUBIC).tobytes()


@pytest.mark.parametrize("less", [(-10, 1), (0, 1), (10, 20), (10, 21), (11, 21), (-1, -9)])
def test_the_order_of_passes_is_pillows(pool: SpreadPool, less: tuple[int, int]) -> None:
    assert pixels.VERSION == PIL.__version__, "is the order still the same?"
    image = noise(60, 61)
    new = (60 - less[0], 61 - less[1])
    columns_first = less[1] > max(0, 2 * less[0])
    between = (60, new[1]) if columns_first else (new[0], 61)
    other = (new[0], 61) if columns_first else (60, new[1])
    found = pixels.resized(image, new, pool)
    assert found == image.resize(new, BICUBIC) == image.resize(between, BICUBIC).resize(new)
    if image.size not in (between, other):
        assert found != image.resize(other, BICUBIC).resize(new)


@pytest.mark.parametrize("width", [1919, 1920, 1921])
def test_large_bands(monkeypatch: pytest.MonkeyPatch, pool: SpreadPool, width: int) -> None:
    """A coefficient that differs a little shows in few of many pixels."""
    monkeypatch.undo()
    image = noise(width, 1081)
    for new in ((1932, 1092), (644, 364)):
        assert pixels.resized(image, new, pool) == image.resize(new, BICUBIC)


def test_another_version_of_pillow_resizes_the_whole(
    monkeypatch: pytest.MonkeyPatch, pool: SpreadPool
) -> None:
    image = noise(60, 61)
    monkeypatch.setattr(PIL, "__version__", "13.1.0")
    monkeypatch.setattr(pool, "spread", None)
    assert pixels.resized(image, (50, 40), pool) == image.resize((50, 40), BICUBIC)


def test_files_of_all_modes(pool: SpreadPool) -> None:
    rules = [PixelRange(28, 3136, 10**6), LongestEdge(28, 112), CenterCrop(28, 84, 84)]
    modes = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK")}
    for rule, kind in product([*rules, Padded(28, 14, 20, 8)], modes):
        processor = ImageProcessor(rule, 7, None, 1 << 20, 10**6)
        for mode in modes[kind]:
            file = encoded(noise(101, 67, mode), kind)
            assert processor.prepare(file, pool=pool) == processor.prepare(file)


def test_files_whose_pixels_need_no_conversion(pool: SpreadPool) -> None:
    """They are what the decoder made, whose file is closed."""
    processor = ImageProcessor(PixelRange(28, 3136, 10**6), 7, None, 1 << 20, 10**6)
    image = noise(101, 67)
    found = [
        processor.prepare(encoded(image, kind, **options), pool=pool)
        for kind, options in {
            "PNG": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}
        }.items()
    ]  # fmt: skip
    assert all(each == found[0] for each in found)


# ---------------------------------------------------------------- the pool


def test_idle_threads_help() -> None:
    with SpreadPool(3) as pool:
        met = [Event() for _ in range(3)]

        def meet(number: int) -> None:
            met[number].set()
            assert all(event.wait(60) for event in met)  # three threads at a time

        pool.submit(pool.spread, meet, range(3)).result()
    assert pool.idle == 3


def test_busy_threads_are_not_waited_for() -> None:
    seen: list[int] = []
    over = Event()
    with SpreadPool(2) as pool:
        busy = pool.submit(over.wait, 60)
        pool._tasks.clear()  # as if the other thread had come to be busy just now
        pool.submit(pool.spread, seen.append, range(5)).result()
        assert seen == [0, 1, 2, 3, 4]
        assert not busy.done()
        over.set()
    assert len(seen) == 5


def test_what_a_thread_raises_is_raised() -> None:
    begun = [Event(), Event()]

    def fail(number: int) -> None:
        begun[number].set()
        assert begun[1 - number].wait(60)
        if number == failing:
            raise ValueError(f"number {number}")

    with SpreadPool(2) as pool:
        for failing in (0, 1):
            for event in begun:
                event.clear()
            with pytest.raises(ValueError, match=f"number {failing}"):
                pool.submit(pool.spread, fail, range(2)).result()
