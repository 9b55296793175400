"""The pool of KV cache pages: which pages are free, referenced, or idle with cached content.

This module owns page numbers, reference counts and the hash of each page's content. Every
operation costs O(1) per page. It knows nothing of steps, slots or priorities, and never accesses
the KV cache itself.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from struct import Struct

DIGEST_SIZE = 16  # bytes


class IntegrityError(AssertionError):
    """The bookkeeping contradicts itself; the message says how."""


class PagePool:
    """`num_pages` pages of `page_size` tokens; each is free, idle (cached) or referenced.

    A page can be found by its hash from its publication until the page is taken for other content.
    If two pages have the same content, only the one published first can be found; the other one
    becomes free on its release. take() prefers free pages, then takes idle pages in the order of
    their release.
    """

    __slots__ = (
        "num_pages",
        "page_size",
        "caching",
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

    def link(self, parent: bytes, tokens: list[int]) -> bytes:
        """The hash of one full page and all pages before it, whose hash is `parent`."""
        page = self._page_hash.copy()
        page.update(parent + self._pack(*tokens))
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

    def forget(self) -> None:
        """Empty the cache: afterwards no page can be found."""
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
        return page

    def check_integrity(self, handles: Iterable[Pages]) -> None:
        """Raise IntegrityError unless the pool is consistent with the pages that `handles` hold."""
        held = [0] * self.num_pages
        for handle in handles:
            if len(set(handle.ids)) < len(handle.ids):
                raise IntegrityError(f"A sequence holds a page twice: {handle.ids}.")
            for page in handle.ids:
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


class Pages:
    """The pages of one sequence, in order of position, and the hashes of its full pages.

    This object alone owns its references; `release` gives all of them back, once. The hashes are
    kept after a release, because known tokens never change.
    """

    __slots__ = ("ids", "_pool", "_chain", "_num_published")

    def __init__(self, pool: PagePool, salt: str) -> None:
        self.ids: list[int] = []
        self._pool = pool
        self._chain = [pool.root(salt)]  # entry k + 1 is the hash of pages 0..k
        self._num_published = 0

    def find_cached(self, tokens: list[int]) -> list[int]:
        """Pages that hold the longest cached prefix of `tokens` without the last token.

        The last token must be computed, because the next token is sampled from its output.
        """
        found: list[int] = []
        if self._pool.caching:
            for index in range((len(tokens) - 1) // self._pool.page_size):
                page = self._pool.find(self._digest(tokens, index))
                if page is None:
                    break
                found.append(page)
        return found

    def cost(self, cached: list[int], length: int) -> int:
        """Number of available pages that open(cached, length) would use up."""
        count = -(-length // self._pool.page_size)
        return count - len(cached) + self._pool.num_idle(cached)

    def open(self, cached: list[int], length: int) -> None:
        """Hold pages for tokens 0..length-1, the first of which are the shared pages `cached`."""
        self._pool.share(cached)  # before take(), which could evict cached pages otherwise
        count = -(-length // self._pool.page_size)
        self.ids = cached + self._pool.take(count - len(cached))
        self._num_published = len(cached)

    def grow(self) -> int:
        """Take one more page and return it."""
        pages = self._pool.take(1)
        self.ids += pages
        return pages[0]

    def publish(self, tokens: list[int], length: int) -> None:
        """Make the full pages among tokens 0..length-1 findable by other sequences.

        Plans already made must compute all of these tokens. Steps run in order, and a step writes
        all its K and V before it reads any, so a published page is filled before another sequence
        reads it.
        """
        if self._pool.caching:
            full = length // self._pool.page_size
            for index in range(self._num_published, full):
                self._pool.publish(self.ids[index], self._digest(tokens, index))
            self._num_published = max(self._num_published, full)

    def release(self) -> None:
        """Give all pages back. A second call does nothing."""
        pages = self.ids
        self.ids = []
        self._pool.give_back(pages)

    def _digest(self, tokens: list[int], index: int) -> bytes:
        chain = self._chain
        size = self._pool.page_size
        for page in range(len(chain) - 1, index + 1):
            chain.append(self._pool.link(chain[-1], tokens[page * size : (page + 1) * size]))
        return chain[index + 1]
