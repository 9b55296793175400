"""The count of bytes that images take in a front end: bounded, and given back."""

from __future__ import annotations

import pytest

from gllm_engine import EngineUnavailable, ImageMemory


def test_what_is_kept_is_counted_until_the_request_is_over() -> None:
    memory = ImageMemory(100)
    one = memory.share()
    one.keep(60)
    other = memory.share()
    with pytest.raises(EngineUnavailable) as caught:
        other.keep(41)
    assert str(caught.value) == (
        "the queue is full: 60 bytes of images are held, and with the 41 of this prompt they would "
        "be more than 100 (image_memory_gib)"
    )
    other.keep(40)
    one.close()
    other.keep(60)
    assert memory.held == 100
    other.close()
    assert memory.held == 0


def test_a_request_alone_may_have_more() -> None:
    memory = ImageMemory(100)
    alone = memory.share()
    alone.keep(90)
    with alone.reserving() as reserve:
        reserve(500)
        with pytest.raises(
            EngineUnavailable, match="590 bytes of images are held, and with the 1 "
        ):
            memory.share().keep(1)
    memory.share().keep(10)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_reserved_is_given_back(fails: bool) -> None:
    """All that was had, also after a refusal, and after the request's end: its threads go on."""
    memory = ImageMemory(100)
    memory.share().keep(10)
    share = memory.share()
    share.keep(20)
    try:
        with share.reserving() as reserve:
            reserve(30)
            share.close()
            reserve(40)
            assert memory.held == 80
            if fails:
                reserve(21)
    except EngineUnavailable:
        assert fails
    assert memory.held == 10
    share.keep(5)  # of a thread that was late: nobody takes it
    assert memory.held == 10


def test_without_a_bound_nothing_is_refused() -> None:
    memory = ImageMemory()
    for _ in range(2):
        memory.share().keep(1 << 60)
