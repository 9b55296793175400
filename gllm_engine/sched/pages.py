"""The pool of KV cache pages: which pages are free, referenced, or idle with cached content.

This module owns page numbers, reference counts and the hash of each page's content. Every
operation costs O(1) per page. It knows nothing of steps, slots or priorities, and never accesses
the KV cache itself.

Layers that see different windows are in different groups, and a sequence has a page table for each
group. With pages of 4 tokens, after 15 tokens:

    tokens                       0..3   4..7   8..11  12..14
    group 0, all tokens           7      2      9      4       pages of one pool
    group 1, a window of 5        -      -      3      8

Token 15 needs tokens 11..15 of group 1, so the group's first two pages have been given back. A
prefix is cached if every group has the pages that the token after the prefix needs.
"""

from __future__ import annotations

import secrets
import sys
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import NamedTuple

from gllm_engine.arch import CacheGroup
from gllm_engine.config import EngineConfig
from gllm_engine.sched.sequence import image_end
from gllm_engine.types import Image

DIGEST_SIZE = 16  # bytes
_PACK_PLACE = Struct("5q").pack


class IntegrityError(AssertionError):
    """The bookkeeping contradicts itself; the message says how."""


class PagePool:
    """`num_pages` pages of `page_size` tokens; each is free, idle (cached) or referenced.

    A page can be found by its hash from its publication until the page is taken for other content.
    If two pages have the same content, only the one published first can be found; the other one
    becomes free on its release. take() prefers free pages, then takes idle pages in the order of
    their release. `version` grows with each change of what can be found.
    """

    __slots__ = (
        "num_pages",
        "page_size",
        "caching",
        "version",
        "_salt_hash",
        "_page_hash",
        "_pack",
        "_refs",
        "_hashes",
        "_index",
        "_free",
        "_idle",
    )

    def __init__(self, num_pages: int, page_size: int, caching: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.caching = caching
        self.version = 0
        key = secrets.token_bytes(32)  # secret, so that no client can construct a collision
        # Copied and never updated: a copy is cheaper than a new keyed hash.
        self._salt_hash = blake2b(digest_size=DIGEST_SIZE, key=key, person=b"salt")
        self._page_hash = blake2b(digest_size=DIGEST_SIZE, key=key, person=b"page")
        self._pack = Struct(f"{page_size}q").pack
        self._refs = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages  # if set, `_index` has it
        self._index: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the next to be taken first

    @property
    def num_free(self) -> int:
        """Number of pages that can be taken: free plus idle pages."""
        return len(self._free) + len(self._idle)

    def root(self, salt: str) -> bytes:
        """The parent hash of a sequence's first page. Different salts never share pages."""
        root = self._salt_hash.copy()
        root.update(salt.encode("utf-8", "surrogatepass"))
        return root.digest()

    def link(self, parent: bytes, tokens: list[int], images: bytes = b"") -> bytes:
        """The hash of one full page and all pages before it, whose hash is `parent`.

        `images`: tells which images the page has embeddings of, and where they begin.
        """
        page = self._page_hash.copy()
        page.update(parent + self._pack(*tokens) + images)
        return page.digest()

    def find(self, digest: bytes) -> int | None:
        return self._index.get(digest)

    def num_idle(self, pages: list[int]) -> int:
        """The number of `pages` without a reference."""
        refs = self._refs
        return sum(1 for page in pages if not refs[page])

    def take(self, count: int) -> list[int]:
        """Take `count` pages of undefined content, each with one reference."""
        if count > self.num_free:
            raise IntegrityError(f"{count} pages were taken while {self.num_free} were free.")
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._refs[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: list[int]) -> None:
        """Add a reference to each of `pages`, which were found by hash."""
        for page in pages:
            if not self._refs[page]:
                del self._idle[page]
            self._refs[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """Drop a reference to each page of a sequence, whose pages are in order of position.

        The last page becomes idle first, so it is evicted before the first page.
        """
        for page in reversed(pages):
            left = self._refs[page] - 1
            if left < 0:
                raise IntegrityError(f"Page {page} was given back by more than its holders.")
            self._refs[page] = left
            if not left:
                if self._hashes[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def publish(self, page: int, digest: bytes) -> None:
        """Make a referenced, full page findable, unless another page already has this hash."""
        if self._index.setdefault(digest, page) == page:
            self._hashes[page] = digest
            self.version += 1

    def forget(self) -> None:
        """Empty the cache: afterwards no page can be found."""
        self.version += 1
        self._index.clear()
        self._hashes = [None] * self.num_pages
        self._free.extend(self._idle)
        self._idle.clear()

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        digest = self._hashes[page]
        assert digest is not None
        del self._index[digest]
        self._hashes[page] = None
        self.version += 1
        return page

    def check_integrity(self, holdings: Iterable[list[int]]) -> None:
        """Raise IntegrityError unless the pool is consistent with the pages of all its holders."""
        held = [0] * self.num_pages
        for ids in holdings:
            if len(set(ids)) < len(ids):
                raise IntegrityError(f"A sequence holds a page twice: {ids}.")
            for page in ids:
                held[page] += 1
        free = set(self._free)
        if len(free) < len(self._free):
            raise IntegrityError("A page is in the free list twice.")
        for page, refs in enumerate(self._refs):
            if refs != held[page]:
                raise IntegrityError(f"Page {page} counts {refs} references, {held[page]} exist.")
            if (page in free) + (page in self._idle) + (refs > 0) != 1:
                raise IntegrityError(f"Page {page} is not exactly one of free, idle, referenced.")
            digest = self._hashes[page]
            if page in self._idle and digest is None or page in free and digest is not None:
                raise IntegrityError(f"Page {page} is idle without a hash, or free with one.")
            if digest is not None and self._index.get(digest) != page:
                raise IntegrityError(f"Page {page} has a hash by which it is not found.")
        if len(self._index) != sum(digest is not None for digest in self._hashes):
            raise IntegrityError("A hash leads to a page that does not carry it.")


@dataclass(frozen=True)
class Group:
    """A page table that every sequence has, over pages of `pool`.

    `window`: a token needs the pages of itself and of the window - 1 tokens before it; None: of all
    tokens before it. `most_pages`: the most pages that a sequence holds at once. `tag`: tells the
    content of this group's pages from that of the pool's other groups.
    """

    pool: PagePool
    window: int | None = None
    most_pages: int = sys.maxsize
    tag: bytes = b""

    def first_needed(self, position: int) -> int:
        """The index of the first page that a token at `position`, or a later one, needs."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.pool.page_size


def make_groups(
    kinds: Sequence[CacheGroup], config: EngineConfig, num_pages: int
) -> tuple[Group, ...]:
    """The groups of a model. `num_pages`: of the pool that all groups with layers share."""
    page_size = config.page_size
    caching = config.enable_prefix_caching
    pool = PagePool(num_pages, page_size, caching)
    groups = []
    for number, kind in enumerate(kinds):
        most_pages = sys.maxsize
        if kind.window is not None:
            # A chunk of the most tokens needs itself and the tokens that its first token sees.
            span = kind.window - 1 + config.max_num_batched_tokens
            most_pages = (span + page_size - 2) // page_size + 1
        mine = pool if kind.layers else PagePool(kind.num_pages(num_pages), page_size, caching)
        groups.append(Group(mine, kind.window, most_pages, tag=bytes([number]) if number else b""))
    return tuple(groups)


def capacity(groups: Sequence[Group], max_tokens: int) -> int:
    """The most tokens, at most `max_tokens`, of a sequence that has the pools to itself."""

    def is_too_long(num_pages: int) -> bool:
        used = Counter[PagePool]()
        for group in groups:
            used[group.pool] += min(num_pages, group.most_pages)
        return any(count > pool.num_pages for pool, count in used.items())

    page_size = groups[0].pool.page_size
    lengths = range(1, -(-max_tokens // page_size) + 1)
    num_pages = bisect_left(lengths, True, key=is_too_long)  # the lengths that fit come first
    return min(num_pages * page_size, max_tokens)


class GroupPages:
    """The pages of one sequence in one group: `ids` are its pages `first`, `first` + 1, ..."""

    __slots__ = ("group", "first", "ids")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.first = 0
        self.ids: list[int] = []

    @property
    def end(self) -> int:
        return self.first + len(self.ids)

    def drop_before(self, index: int) -> None:
        """Give back the pages before page `index`."""
        if index > self.first:
            gone = self.ids[: index - self.first]
            self.ids = self.ids[index - self.first :]
            self.first = index
            self.group.pool.give_back(gone)


class CachedPrefix(NamedTuple):
    """The cached beginning of a prompt that a sequence can use; valid until the pools change.

    All groups have the pages that the token after it needs. There is a snapshot after it if the
    model needs one.
    """

    num_pages: int
    pages: list[list[int]]  # by group: the last ones of the prefix, those that are needed
    num_stored: int  # pages of the longest prefix that the groups could serve with a snapshot
    snapshot: int | None


class Pages:
    """The pages of one sequence in every group, and the hashes of its full pages.

    This object alone owns its references; `release` gives all of them back, once. The hashes are
    kept after a release, because known tokens never change.

    `snapshots`: of the states of layers that keep one per sequence and not K and V per token; None
    if the model has no such layers. They are found by the hash of the pages before them.

    `images`: of the sequence. Equal tokens with other images in their place have other hashes.
    """

    __slots__ = (
        "groups",
        "snapshots",
        "_pool",
        "_page_size",
        "_images",
        "_chain",
        "_found",
        "_num_published",
    )

    def __init__(
        self,
        groups: Sequence[Group],
        salt: str,
        snapshots: PagePool | None = None,
        images: Sequence[Image] = (),
    ) -> None:
        self.groups = [GroupPages(group) for group in groups]
        self.snapshots = snapshots
        self._pool = groups[0].pool  # hashes the pages of all groups
        self._page_size = size = self._pool.page_size
        self._images: dict[int, bytes] = {}  # by page
        for image in images:
            for page in range(image.first // size, (image_end(image) - 1) // size + 1):
                place = (image.first - page * size, image.rows, image.columns, image.stride)
                time = -1 if image.time is None else image.time
                packed = image.digest + _PACK_PLACE(*place, time)
                self._images[page] = self._images.get(page, b"") + packed
        self._chain = [self._pool.root(salt)]  # entry k + 1 is the hash of pages 0..k
        self._found = (-1, self.nothing_cached())  # of which version, and what
        self._num_published = 0

    def find_cached(self, tokens: list[int]) -> CachedPrefix:
        """The longest prefix of `tokens` that can be used.

        The prefix is without the last token, which must be computed, because the next token is
        sampled from its output. A group with a window needs only the prefix's last pages.

        `tokens` may only grow from call to call. Every plan asks for many waiting sequences, so
        what was found is kept until a pool changes.
        """
        if not self._pool.caching:
            return self.nothing_cached()
        # Each of these numbers only grows, so equal sums tell that all are equal.
        version = len(tokens) + sum([part.group.pool.version for part in self.groups])
        if self.snapshots is not None:
            version += self.snapshots.version
        if self._found[0] != version:
            self._found = version, self._look_up(tokens)
        return self._found[1]

    def _look_up(self, tokens: list[int]) -> CachedPrefix:
        most = (len(tokens) - 1) // self._page_size
        whole = {
            number: self._first_cached(part.group, tokens, most)
            for number, part in enumerate(self.groups)
            if part.group.window is None
        }
        count, shown = self._with_windows(tokens, min([most, *map(len, whole.values())]))
        stored = count
        snapshot: int | None = None
        if self.snapshots is not None:
            while count and (snapshot := self.find_snapshot(tokens, count)) is None:
                count, shown = self._with_windows(tokens, count - 1)
        found = {number: pages[:count] for number, pages in whole.items()} | shown
        return CachedPrefix(count, [found[i] for i in range(len(self.groups))], stored, snapshot)

    def nothing_cached(self) -> CachedPrefix:
        return CachedPrefix(0, [[] for _ in self.groups], 0, None)

    def _first_cached(self, group: Group, tokens: list[int], most: int) -> list[int]:
        """The group's first pages, up to the first that is not cached, and at most `most`."""
        find = group.pool.find
        chain = self._chain
        pages = []
        for number in range(1, most + 1):  # as _key, whose calls would take twice as long
            digest = chain[number] if number < len(chain) else self.digest(tokens, number)
            page = find(group.tag + digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def _with_windows(self, tokens: list[int], most: int) -> tuple[int, dict[int, list[int]]]:
        """The length of the longest prefix, at most `most` pages, that the groups with a window can
        serve; and, by number of the group, their pages that the token after the prefix needs.
        """
        count = most
        before = -1
        shown: dict[int, list[int]] = {}
        while count != before:  # a shorter prefix needs earlier pages
            before = count
            for number, part in enumerate(self.groups):
                if part.group.window is not None:
                    count, shown[number] = self._last_cached(part.group, tokens, count)
        return count, shown

    def _last_cached(self, group: Group, tokens: list[int], most: int) -> tuple[int, list[int]]:
        """As _with_windows, of one group."""
        count = most
        pages: list[int] = []
        index = count - 1
        while index >= group.first_needed(count * self._page_size):
            page = group.pool.find(self._key(group, tokens, index))
            if page is None:
                count = index
                pages = []
            else:
                pages.append(page)
            index -= 1
        return count, pages[::-1]

    def find_snapshot(self, tokens: list[int], num_pages: int) -> int | None:
        """The snapshot of the state after `num_pages` pages of `tokens`."""
        if self.snapshots is None:
            return None
        return self.snapshots.find(self.digest(tokens, num_pages))

    def publish_snapshot(self, snapshot: int, tokens: list[int], num_pages: int) -> None:
        """Make a snapshot findable, by the plan that takes it and all later ones.

        Other than the K and V of a page, a state is needed before the first layer that has it runs;
        a plan copies states before its rows run.
        """
        if self.snapshots is not None:
            self.snapshots.publish(snapshot, self.digest(tokens, num_pages))

    def fit(self, tokens: list[int], cached: CachedPrefix, reserve: int) -> bool:
        """Whether the pools have the pages for open() and for growing to all `tokens`.

        `cached`: from find_cached. `reserve`: pages of the first group's pool that stay free.
        """
        count = -(-len(tokens) // self._page_size)
        used = Counter({self._pool: reserve})
        for part, found in zip(self.groups, cached.pages, strict=True):
            group = part.group
            fresh = min(count - cached.num_pages + len(found), group.most_pages) - len(found)
            used[group.pool] += fresh + group.pool.num_idle(found)
        return all(count <= pool.num_free for pool, count in used.items())

    def open(self, tokens: list[int], cached: CachedPrefix) -> None:
        """Hold the pages of the prefix that find_cached has found since the last other change.

        Groups without a window also get the pages of all other tokens.
        """
        self._found = (-1, cached)  # its lists are those of the sequence now
        # Before take(), which could evict cached pages otherwise.
        for part, found in zip(self.groups, cached.pages, strict=True):
            part.group.pool.share(found)
            part.first = cached.num_pages - len(found)
            part.ids = found
        self._num_published = cached.num_pages
        count = -(-len(tokens) // self._page_size)
        for part in self.groups:
            if part.group.window is None:
                part.ids = part.ids + part.group.pool.take(count - cached.num_pages)

    def drop_unneeded(self, position: int) -> None:
        """Give back the pages that no token at `position` or after it needs.

        Plans in flight may still read them, but they run before any later plan.
        """
        for part in self.groups:
            if part.group.window is not None:
                part.drop_before(part.group.first_needed(position))

    def can_grow(self, length: int) -> bool:
        """Whether the pools have the pages that grow(length) takes."""
        count = -(-length // self._page_size)
        missing: dict[PagePool, int] = {}
        for part in self.groups:
            pool = part.group.pool
            missing[pool] = missing.get(pool, 0) + max(0, count - part.end)
        return all(number <= pool.num_free for pool, number in missing.items())

    def grow(self, length: int) -> Iterator[tuple[int, int, list[int]]]:
        """Take pages for tokens up to `length` - 1; yields (group, index of the first, pages)."""
        count = -(-length // self._page_size)
        for number, part in enumerate(self.groups):
            first = part.end
            if first < count:
                pages = part.group.pool.take(count - first)
                part.ids += pages
                yield number, first, pages

    def publish(self, tokens: list[int], length: int) -> None:
        """Make the full pages among tokens 0..length-1 findable by other sequences.

        Plans already made must compute all of these tokens. Steps run in order, and a step writes
        all its K and V before it reads any, so a published page is filled before another sequence
        reads it.
        """
        if not self._pool.caching:
            return
        full = length // self._page_size
        for index in range(self._num_published, full):
            for part in self.groups:
                if index >= part.first:
                    page = part.ids[index - part.first]
                    part.group.pool.publish(page, self._key(part.group, tokens, index))
        self._num_published = max(self._num_published, full)

    def release(self) -> None:
        """Give all pages back. A second call does nothing."""
        for part in self.groups:
            pages = part.ids
            part.ids = []
            part.first = 0
            part.group.pool.give_back(pages)

    def _key(self, group: Group, tokens: list[int], index: int) -> bytes:
        """The key in the pool of the group's page `index`."""
        return group.tag + self.digest(tokens, index + 1)

    def digest(self, tokens: list[int], num_pages: int) -> bytes:
        """The hash of the first pages of `tokens`."""
        chain = self._chain
        size = self._page_size
        for page in range(len(chain) - 1, num_pages):
            ids = tokens[page * size : (page + 1) * size]
            chain.append(self._pool.link(chain[-1], ids, self._images.get(page, b"")))
        return chain[num_pages]
