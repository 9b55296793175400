from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_engine.sched.pages import IntegrityError, PagePool, Pages

PAGE = 4


def fill(pool: PagePool, tokens: list[int], salt: str = "") -> Pages:
    """A sequence that has computed and published all of `tokens`."""
    pages = Pages(pool, salt)
    pages.open(pages.find_cached(tokens), len(tokens))
    pages.publish(tokens, len(tokens))
    return pages


def cached(pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Cached pages of a sequence that begins with `tokens`."""
    return Pages(pool, salt).find_cached([*tokens, 0])


def test_only_full_pages_are_shared_and_a_token_is_left() -> None:
    pool = PagePool(8, PAGE)
    tokens = list(range(10))
    first = fill(pool, tokens)
    assert len(first.ids) == 3
    assert cached(pool, tokens) == first.ids[:2]
    assert cached(pool, tokens[:8]) == first.ids[:2]
    assert Pages(pool, "").find_cached(tokens[:8]) == first.ids[:1]
    assert Pages(pool, "").find_cached(tokens[:1]) == []
    assert cached(pool, [9, *tokens[1:]]) == []  # a page stands for all before it
    assert cached(pool, tokens[4:8]) == []
    second = fill(pool, [*tokens[:8], 77, 78])
    assert second.ids[:2] == first.ids[:2] and second.ids[2] != first.ids[2]
    pool.check_integrity([first, second])
    first.release()
    pool.check_integrity([second])
    second.release()
    pool.check_integrity([])
    assert pool.num_free == 8


def test_release_is_idempotent() -> None:
    pool = PagePool(4, PAGE)
    one, other = fill(pool, [1] * 4), fill(pool, [1] * 5)
    assert one.ids[0] == other.ids[0]
    one.release()
    one.release()
    pool.check_integrity([other])
    assert pool.num_free == 2


def test_salts_and_pools_share_nothing() -> None:
    pool = PagePool(8, PAGE)
    fill(pool, [1] * 8, salt="a")
    assert len(cached(pool, [1] * 8, salt="a")) == 2
    assert cached(pool, [1] * 8) == cached(pool, [1] * 8, salt="b") == []
    assert cached(pool, [1] * 8, salt="\ud800") == []  # any text can be a salt
    assert PagePool(8, PAGE).root("a") != pool.root("a")  # the key is random


def test_without_caching_nothing_is_found() -> None:
    pool = PagePool(4, PAGE, caching=False)
    pages = fill(pool, [1] * 8)
    assert cached(pool, [1] * 8) == []
    pages.release()
    pool.check_integrity([])


def test_never_cached_pages_go_first_then_the_least_recent_tail_first() -> None:
    pool = PagePool(6, PAGE)
    old, new = fill(pool, [1] * 8), fill(pool, [2] * 8)
    old_ids, new_ids = old.ids, new.ids
    free = pool.take(2)
    pool.give_back(free)
    old.release()
    new.release()
    assert set(pool.take(2)) == set(free)
    assert pool.take(4) == [old_ids[1], old_ids[0], new_ids[1], new_ids[0]]
    assert cached(pool, [1] * 8) == cached(pool, [2] * 8) == []


def test_a_hit_makes_an_old_page_recent() -> None:
    pool = PagePool(2, PAGE)
    old, new = fill(pool, [1] * 4), fill(pool, [2] * 4)
    old_ids, new_ids = old.ids, new.ids
    old.release()
    new.release()
    again = Pages(pool, "")
    again.open(again.find_cached([1] * 5), 4)
    assert again.ids == old_ids
    again.release()
    assert pool.take(2) == new_ids + old_ids


def test_opening_never_evicts_what_was_found() -> None:
    pool = PagePool(3, PAGE)
    fill(pool, [1] * 8).release()
    pages = Pages(pool, "")
    tokens = [1] * 4 + [2] * 8
    hits = pages.find_cached(tokens)
    assert len(hits) == 1
    assert pages.cost(hits, len(tokens)) == 3  # two new ones, and the idle one
    pages.open(hits, len(tokens))
    assert pages.ids[0] == hits[0]
    assert pages.cost(hits, len(tokens)) == 2
    pool.check_integrity([pages])


def test_equal_content_keeps_one_mapping() -> None:
    pool = PagePool(5, PAGE)
    tokens = [3] * 8
    one, two = Pages(pool, ""), Pages(pool, "")
    one.open([], 8)
    two.open([], 8)
    one.publish(tokens, 4)
    two.publish(tokens, 8)  # its first page duplicates one's, its second is the first of its kind
    one.publish(tokens, 8)
    first, second = one.ids[0], two.ids[1]
    assert cached(pool, tokens) == [first, second]
    pool.check_integrity([one, two])
    duplicates = {one.ids[1], two.ids[0]}
    two.release()
    one.release()
    pool.check_integrity([])
    assert duplicates < set(pool.take(3))  # they are free at once, and deleted nobody's mapping
    assert cached(pool, tokens) == [first, second]


def test_growing() -> None:
    pool = PagePool(2, PAGE)
    pages = fill(pool, [1] * 4)
    assert pages.ids == [pages.ids[0], pages.grow()]
    pages.publish([1] * 8, 8)
    assert cached(pool, [1] * 8) == pages.ids


def test_hashes_outlive_a_release() -> None:
    pool = PagePool(2, PAGE)
    pages = fill(pool, [1] * 8)
    ids = pages.ids
    pages.release()
    assert pages.find_cached([1] * 9) == ids
    pages.open(ids, 8)
    pages.publish([1] * 8, 8)
    pool.check_integrity([pages])


def test_forget() -> None:
    pool = PagePool(4, PAGE)
    fill(pool, [1] * 8).release()
    held = fill(pool, [2] * 4)
    pool.forget()
    assert cached(pool, [1] * 8) == cached(pool, [2] * 4) == []
    pool.check_integrity([held])
    held.release()
    assert len(set(pool.take(4))) == 4


def test_taking_too_much() -> None:
    with pytest.raises(IntegrityError, match="3 pages were taken while 2 were free"):
        PagePool(2, PAGE).take(3)


def test_giving_back_twice() -> None:
    pool = PagePool(2, PAGE)
    pages = pool.take(1)
    pool.give_back(pages)
    with pytest.raises(IntegrityError, match="by more than its holders"):
        pool.give_back(pages)


def test_check_integrity_finds_faults() -> None:
    def fault(expected: str, handles: list[Pages]) -> None:
        with pytest.raises(IntegrityError, match=expected):
            pool.check_integrity(handles)

    pool = PagePool(4, PAGE)
    held, idle = fill(pool, [1] * 4), fill(pool, [2] * 4)
    page = idle.ids[0]
    fault(f"Page {page} counts 1 references, 0 exist", [held])
    idle.release()
    pool.check_integrity([held])

    pool._free.append(pool._free[-1])
    fault("free list twice", [held])
    pool._free.pop()
    lost = pool._free.pop()
    fault(f"Page {lost} is not exactly one of", [held])
    pool._free.append(lost)
    digest = pool._hashes[page]
    pool._hashes[page] = None
    fault(f"Page {page} is idle without a hash", [held])
    pool._hashes[page] = b"other"
    fault(f"Page {page} has a hash by which it is not found", [held])
    pool._hashes[page] = digest
    pool._index[b"stale"] = page
    fault("A hash leads to a page that does not carry it", [held])
    del pool._index[b"stale"]
    held.ids.append(held.ids[0])
    fault("holds a page twice", [held])
    held.ids.pop()
    pool.check_integrity([held])


@given(st.lists(st.integers(0, 2**62), min_size=8, max_size=8), st.integers(0, 7))
def test_any_change_of_a_token_changes_the_hash(tokens: list[int], position: int) -> None:
    pool = PagePool(4, PAGE)
    fill(pool, tokens)
    changed = [*tokens]
    changed[position] += 1
    assert len(cached(pool, tokens)) == 2
    assert len(cached(pool, changed)) == position // PAGE
