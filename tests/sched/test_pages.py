from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_engine.sched.pages import Group, IntegrityError, PagePool, Pages, capacity
from gllm_engine.types import Image

PAGE = 4


def fill(pool: PagePool, tokens: list[int], salt: str = "") -> Pages:
    """A sequence that has computed and published all of `tokens`."""
    pages = Pages([Group(pool)], salt)
    pages.open(tokens, pages.find_cached(tokens))
    pages.publish(tokens, len(tokens))
    return pages


def pages_of(*sequences: Pages) -> list[list[int]]:
    return [part.ids for pages in sequences for part in pages.groups]


def cached(pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Cached pages of a sequence that begins with `tokens`."""
    pages = Pages([Group(pool)], salt)
    return pages.find_cached([*tokens, 0]).pages[0]


def test_only_full_pages_are_shared_and_a_token_is_left() -> None:
    pool = PagePool(8, PAGE)
    tokens = list(range(10))
    first = fill(pool, tokens)
    assert len(first.groups[0].ids) == 3
    assert cached(pool, tokens) == first.groups[0].ids[:2]
    assert cached(pool, tokens[:8]) == first.groups[0].ids[:2]
    assert Pages([Group(pool)], "").find_cached(tokens[:8]).num_pages == 1
    assert Pages([Group(pool)], "").find_cached(tokens[:1]).num_pages == 0
    assert cached(pool, [9, *tokens[1:]]) == []  # a page stands for all before it
    assert cached(pool, tokens[4:8]) == []
    second = fill(pool, [*tokens[:8], 77, 78])
    assert (
        second.groups[0].ids[:2] == first.groups[0].ids[:2]
        and second.groups[0].ids[2] != first.groups[0].ids[2]
    )
    pool.check_integrity(pages_of(first, second))
    first.release()
    pool.check_integrity(pages_of(second))
    second.release()
    pool.check_integrity([])
    assert pool.num_free == 8


def test_release_is_idempotent() -> None:
    pool = PagePool(4, PAGE)
    one, other = fill(pool, [1] * 4), fill(pool, [1] * 5)
    assert one.groups[0].ids[0] == other.groups[0].ids[0]
    one.release()
    one.release()
    pool.check_integrity(pages_of(other))
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
    old_ids, new_ids = old.groups[0].ids, new.groups[0].ids
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
    old_ids, new_ids = old.groups[0].ids, new.groups[0].ids
    old.release()
    new.release()
    again = Pages([Group(pool)], "")
    again.open([1] * 4, again.find_cached([1] * 5))
    assert again.groups[0].ids == old_ids
    again.release()
    assert pool.take(2) == new_ids + old_ids


def test_opening_never_evicts_what_was_found() -> None:
    pool = PagePool(3, PAGE)
    fill(pool, [1] * 8).release()
    tokens = [1] * 4 + [2] * 8
    hits = cached(pool, tokens)
    assert len(hits) == 1
    pages = Pages([Group(pool)], "")
    found = pages.find_cached(tokens)
    assert found.num_pages == 1
    assert pages.fit(tokens, found, reserve=0)  # two new ones, and the idle one
    assert not pages.fit(tokens, found, reserve=1)
    pages.open(tokens, found)
    assert pages.groups[0].ids[0] == hits[0]
    pool.check_integrity(pages_of(pages))


def test_equal_content_keeps_one_mapping() -> None:
    pool = PagePool(5, PAGE)
    tokens = [3] * 8
    one, two = Pages([Group(pool)], ""), Pages([Group(pool)], "")
    one.open(tokens, one.nothing_cached())
    two.open(tokens, two.nothing_cached())
    one.publish(tokens, 4)
    two.publish(tokens, 8)  # its first page duplicates one's, its second is the first of its kind
    one.publish(tokens, 8)
    first, second = one.groups[0].ids[0], two.groups[0].ids[1]
    assert cached(pool, tokens) == [first, second]
    pool.check_integrity(pages_of(one, two))
    duplicates = {one.groups[0].ids[1], two.groups[0].ids[0]}
    two.release()
    one.release()
    pool.check_integrity([])
    assert duplicates < set(pool.take(3))  # they are free at once, and deleted nobody's mapping
    assert cached(pool, tokens) == [first, second]


def test_growing() -> None:
    pool = PagePool(2, PAGE)
    pages = fill(pool, [1] * 4)
    assert pages.can_grow(8) and not pages.can_grow(9)
    ((group, first, fresh),) = pages.grow(8)
    assert (group, first) == (0, 1) and pages.groups[0].ids[1:] == fresh
    assert not list(pages.grow(8))
    pages.publish([1] * 8, 8)
    assert cached(pool, [1] * 8) == pages.groups[0].ids


def test_hashes_outlive_a_release() -> None:
    pool = PagePool(2, PAGE)
    pages = fill(pool, [1] * 8)
    ids = pages.groups[0].ids
    pages.release()
    found = pages.find_cached([1] * 9)
    assert found.num_pages == 2
    pages.open([1] * 8, found)
    assert pages.groups[0].ids == ids
    pages.publish([1] * 8, 8)
    pool.check_integrity(pages_of(pages))


def test_forget() -> None:
    pool = PagePool(4, PAGE)
    fill(pool, [1] * 8).release()
    held = fill(pool, [2] * 4)
    pool.forget()
    assert cached(pool, [1] * 8) == cached(pool, [2] * 4) == []
    pool.check_integrity(pages_of(held))
    held.release()
    assert len(set(pool.take(4))) == 4


@given(st.lists(st.integers(0, 5), max_size=40))
def test_what_is_found_again_is_what_is_there(choices: list[int]) -> None:
    """A sequence that waits finds what a new one does, whatever others do meanwhile."""
    pool = PagePool(8, PAGE)
    snapshots = PagePool(2, PAGE)
    groups = [Group(pool), Group(PagePool(6, PAGE), window=5)]
    tokens = list(range(14))
    waiting = [Pages(groups, "", kept) for kept in (None, snapshots)]
    running: list[Pages] = []
    for choice in choices:
        if choice < 2 and not running:
            pages = Pages(groups, "", snapshots)
            given = tokens[: 6 + 8 * choice] + [99]
            found = pages.find_cached(given)
            if pages.fit(given, found, 0):
                pages.open(given, found)
                list(pages.grow(len(given)))
                pages.publish(given, len(given))
                running.append(pages)
        elif choice == 2 and running:
            running.pop().release()
        elif choice == 3:  # other content takes all free pages
            for group in groups:
                group.pool.give_back(group.pool.take(group.pool.num_free))
        elif choice == 4 and running and snapshots.num_free:
            (snapshot,) = snapshots.take(1)
            running[0].publish_snapshot(snapshot, tokens, 1)
            snapshots.give_back([snapshot])
        elif choice == 5:
            tokens.append(len(tokens))
        for pages in waiting:
            fresh = Pages(groups, "", pages.snapshots)
            assert pages.find_cached(tokens) == fresh.find_cached(tokens)
            assert pages.find_cached(tokens) is pages.find_cached(tokens)


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
            pool.check_integrity(pages_of(*handles))

    pool = PagePool(4, PAGE)
    held, idle = fill(pool, [1] * 4), fill(pool, [2] * 4)
    page = idle.groups[0].ids[0]
    fault(f"Page {page} counts 1 references, 0 exist", [held])
    idle.release()
    pool.check_integrity(pages_of(held))

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
    held.groups[0].ids.append(held.groups[0].ids[0])
    fault("holds a page twice", [held])
    held.groups[0].ids.pop()
    pool.check_integrity(pages_of(held))


@given(st.lists(st.integers(0, 2**62), min_size=8, max_size=8), st.integers(0, 7))
def test_any_change_of_a_token_changes_the_hash(tokens: list[int], position: int) -> None:
    pool = PagePool(4, PAGE)
    fill(pool, tokens)
    changed = [*tokens]
    changed[position] += 1
    assert len(cached(pool, tokens)) == 2
    assert len(cached(pool, changed)) == position // PAGE


def make_groups(num_pages: int, *windows: int | None) -> list[Group]:
    pool = PagePool(num_pages, PAGE)
    return [Group(pool, window, tag=bytes([i])) for i, window in enumerate(windows)]


def begin(groups: list[Group], tokens: list[int], step: int) -> Pages:
    """A sequence that has computed `tokens`, at most `step` of them in each chunk."""
    pages = Pages(groups, "")
    found = pages.find_cached([*tokens, 0])
    pages.open(tokens, found)
    for start in range(found.num_pages * PAGE, len(tokens), step):
        end = min(start + step, len(tokens))
        pages.drop_unneeded(start)
        list(pages.grow(end))
        pages.publish(tokens, end)
    pages.drop_unneeded(len(tokens))
    return pages


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(("window", "kept"), [(1, 0), (2, 1), (5, 1), (6, 2), (17, 4), (99, 5)])
def test_a_window_keeps_only_what_the_next_token_sees(window: int, kept: int, step: int) -> None:
    groups = make_groups(20, None, window)
    pages = begin(groups, list(range(20)), step)
    whole, part = pages.groups
    assert (whole.first, len(whole.ids)) == (0, 5)
    assert (part.first, len(part.ids)) == (5 - kept, kept)
    groups[0].pool.check_integrity(pages_of(pages))
    pages.release()
    groups[0].pool.check_integrity([])


def test_a_prefix_is_cached_if_each_group_has_what_the_next_token_sees() -> None:
    tokens = list(range(20))
    groups = make_groups(10, None, 5)
    pool = groups[0].pool
    begin(groups, tokens, 20).release()
    assert Pages(groups, "").find_cached([*tokens, 0]).num_pages == 5
    lose(groups[1], tokens, 4)
    assert Pages(groups, "").find_cached([*tokens, 0]).num_pages == 4
    pages = begin(groups, tokens[:17], 20)
    assert [len(part.ids) for part in pages.groups] == [5, 2]
    pool.check_integrity(pages_of(pages))


def lose(group: Group, tokens: list[int], index: int) -> None:
    """As if an idle page had been taken for other content, and given back."""
    pool = group.pool
    page = pool.find(Pages([group], "")._key(group, tokens, index))
    assert page is not None
    pool._idle.move_to_end(page, last=False)
    pool._evict()
    pool._free.append(page)


def test_a_prefix_that_one_group_shortens_is_looked_up_again_in_the_others() -> None:
    tokens = list(range(20))
    groups = make_groups(20, 5, None)
    begin(groups, tokens, 20).release()
    lose(groups[1], tokens, 4)  # so that a prefix has 4 pages, and needs page 3 of the window
    lose(groups[0], tokens, 3)
    assert Pages(groups, "").find_cached([*tokens, 0]).num_pages == 3
    groups[0].pool.check_integrity([])


def test_a_prefix_with_a_snapshot_is_looked_up_again_in_groups_with_a_window() -> None:
    tokens = list(range(20))
    groups = make_groups(20, None, 5)
    snapshots = PagePool(2, PAGE)
    begin(groups, tokens, 20).release()

    def find() -> int:
        found = Pages(groups, "", snapshots).find_cached([*tokens, 0])
        assert found.num_stored == 5 and (found.snapshot is None) == (not found.num_pages)
        return found.num_pages

    assert find() == 0
    for num_pages, snapshot in zip((2, 4), snapshots.take(2), strict=True):
        Pages(groups, "", snapshots).publish_snapshot(snapshot, tokens, num_pages)
    assert find() == 4
    lose(groups[1], tokens, 3)  # K and V serve 5 pages, but not 4
    assert find() == 2
    lose(groups[1], tokens, 1)
    assert find() == 0


def test_groups_do_not_find_pages_of_each_other() -> None:
    groups = make_groups(10, 9, 9)
    tokens = list(range(8))
    pages = begin(groups, tokens, 8)
    assert len({page for part in pages.groups for page in part.ids}) == 4
    other = begin(groups, tokens, 8)
    assert [part.ids for part in other.groups] == [part.ids for part in pages.groups]


def test_a_sequence_fits_if_every_group_has_its_most_pages() -> None:
    pool = PagePool(10, PAGE)
    assert capacity([Group(pool)], 1000) == 40
    assert capacity([Group(pool)], 30) == 30
    assert capacity([Group(pool), Group(pool, 5, most_pages=3)], 1000) == 7 * PAGE
    assert capacity([Group(pool), Group(pool, 99, most_pages=30)], 1000) == 5 * PAGE
    assert capacity([Group(pool, 5, most_pages=10)], 1000) == 1000
    assert capacity([Group(pool, 5, most_pages=3), Group(PagePool(50, PAGE))], 1000) == 200


def picture(digest: bytes, first: int, **shape: int) -> Image:
    sizes = {"rows": 2, "columns": 3, "stride": 3, "height": 1, "width": 1} | shape
    return Image(digest=digest * 16, first=first, pixels=b"", **sizes)


# Token 9 stands for an embedding of an image, which begins with the third token.
PROMPT = [5, 6, *[9] * 6, 7, 8, 1, 2, 3]


@pytest.mark.parametrize(
    ("first", "second", "num_shared"),
    [
        ([picture(b"a", 2)], [picture(b"a", 2)], 3),
        ([picture(b"a", 2)], [picture(b"b", 2)], 0),
        ([picture(b"a", 2)], [], 0),
        ([picture(b"a", 2, time=1)], [picture(b"a", 2, time=1)], 3),
        ([picture(b"a", 2, time=1)], [picture(b"a", 2, time=2)], 0),
        ([picture(b"a", 2, time=0)], [picture(b"a", 2)], 0),
        ([picture(b"a", 2)], [picture(b"a", 3)], 0),
        ([picture(b"a", 2)], [picture(b"a", 2, rows=3, columns=2, stride=2)], 0),
        ([picture(b"a", 2)], [picture(b"a", 2), picture(b"b", 8, rows=1, columns=1)], 2),
        ([], [picture(b"a", 4, rows=1, columns=4, stride=4)], 1),
    ],
)
def test_equal_tokens_share_pages_if_their_images_are_equal(
    first: list[Image], second: list[Image], num_shared: int
) -> None:
    pool = PagePool(8, PAGE)
    snapshots = PagePool(2, PAGE)
    (snapshot,) = snapshots.take(1)
    one = Pages([Group(pool)], "", snapshots, first)
    one.open(PROMPT, one.nothing_cached())
    one.publish(PROMPT, len(PROMPT))
    one.publish_snapshot(snapshot, PROMPT, 3)
    other = Pages([Group(pool)], "", snapshots, second)
    assert other.find_cached(PROMPT).num_stored == num_shared
    assert (other.find_snapshot(PROMPT, 3) is not None) == (num_shared == 3)
