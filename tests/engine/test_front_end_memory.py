"""The count of bytes that images take in a front end: bounded, and given back."""

from __future__ import annotations

from contextlib import closing

import pytest

from gllm_engine import EngineUnavailable, ImageMemory, ImageShare


def test_what_is_kept_is_counted_until_the_request_is_over() -> None:
    memory = ImageMemory(100)
    one = ImageShare(memory)
    one.reserve(60)
    other = ImageShare(memory)
    with pytest.raises(EngineUnavailable) as caught:
        other.reserve(41)
    assert str(caught.value) == (
        "the queue is full: 60 bytes of images are held, and with the 41 of this prompt they would "
        "be more than 100 (image_memory_gib)"
    )
    other.reserve(40)
    one.close()
    other.reserve(60)
    assert memory.held == 100
    other.close()
    assert memory.held == 0


def test_a_request_alone_may_have_more() -> None:
    memory = ImageMemory(100)
    alone = ImageShare(memory)
    alone.reserve(90)
    with closing(ImageShare(memory, alone)) as part:
        part.reserve(500)
        with pytest.raises(
            EngineUnavailable, match="590 bytes of images are held, and with the 1 "
        ):
            ImageShare(memory).reserve(1)
    ImageShare(memory).reserve(10)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_reserved_is_given_back(fails: bool) -> None:
    """All that was had, also after a refusal, and after the request's end: its threads go on."""
    memory = ImageMemory(100)
    ImageShare(memory).reserve(10)
    share = ImageShare(memory)
    share.reserve(20)
    try:
        with closing(ImageShare(memory, share)) as part:
            part.reserve(30)
            share.close()
            part.reserve(40)
            assert memory.held == 80
            if fails:
                part.reserve(21)
    except EngineUnavailable:
        assert fails
    assert memory.held == 10
    share.reserve(5)  # of a thread that was late: nobody takes it
    assert memory.held == 10


@pytest.mark.parametrize("is_over", [False, True])
def test_what_a_part_leaves_its_request_needs_no_other_room(is_over: bool) -> None:
    memory = ImageMemory(100)
    ImageShare(memory).reserve(20)
    share = ImageShare(memory)
    part = ImageShare(memory, share)
    part.reserve(80)
    if is_over:
        share.close()
    part.close(kept=30)
    part.close()
    assert memory.held == 20 + 30 * (not is_over)
    share.close()
    assert memory.held == 20


def test_without_a_bound_nothing_is_refused() -> None:
    memory = ImageMemory()
    for _ in range(2):
        ImageShare(memory).reserve(1 << 60)
