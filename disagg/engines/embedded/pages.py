"""The paged KV memory of one engine: who may write where, and what may be used again.

Theory of operation. The memory is one array of equal pages; a page holds the keys and values of ``page_size``
consecutive tokens of every layer and is one contiguous range of bytes, so that it can be sent and received without a
copy. A page is in exactly one place:

    free ──allocate──▶ held (1..n references) ──release──▶ free, or idle if the cache knows its content
      ▲                  │          ▲                       │
      │                  │          └────────share──────────┤
      └──acquit── quarantined       allocate ◀──evicted, oldest first

* *idle*: nobody computes with it, the prefix cache still knows its content. Idle pages count as free: an allocation
  takes the free pages first and then the idle page that was released longest ago.
* *quarantined*: somebody outside this process was told that it may write there and is not known to have stopped. Such
  a page is not given to anybody, because a late write would put one request's keys into another request's answer
  (FAILURES F02, F20). It comes back when its owner is acquitted: the writer said that it stopped, or its connection is
  closed and drained.

Pure: no clock, no sockets. Pages are given out in a fixed order, so that equal histories give equal page numbers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

DEFAULT_PAGE_SIZE = 16
"""Tokens of one page."""


class OutOfPagesError(Exception):
    """Fewer pages are free than were asked for; nothing was taken."""


def pages_for(tokens: int, page_size: int) -> int:
    """How many pages hold ``tokens`` tokens."""
    return -(-tokens // page_size)


class PagePool:
    """A fixed number of pages with reference counts.

    Args:
        pages: how many pages there are.
        page_shape: shape of one page, ``(layers, 2, page_size, kv_heads, head_dim)``.

    Attributes:
        kv: float32, ``(pages, *page_shape)``, C-contiguous. The system backs it with memory as pages are first written.
        page_bytes_count: bytes of one page.
    """

    def __init__(self, pages: int, page_shape: tuple[int, ...]) -> None:
        self.kv: NDArray[np.float32] = np.zeros((pages, *page_shape), dtype=np.float32)
        self.size = pages
        self.page_bytes_count = self.kv[0].nbytes if pages else 0
        self._bytes = self.kv.reshape(-1).view(np.uint8).data
        self._references = [0] * pages
        self._free = deque(range(pages))
        self._known = [False] * pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._quarantined: dict[str, list[int]] = {}
        self._forget: Callable[[int], None] = lambda _page: None

    @property
    def free(self) -> int:
        """Pages that an allocation can have, the idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def quarantined(self) -> int:
        """Pages that wait for the proof that their remote writer stopped."""
        return sum(map(len, self._quarantined.values()))

    @property
    def held(self) -> int:
        """Pages that a request computes with or receives into."""
        return self.size - self.free - self.quarantined

    def page_bytes(self, page: int) -> memoryview:
        """The bytes of a page, writable, not a copy."""
        start = page * self.page_bytes_count
        return self._bytes[start : start + self.page_bytes_count]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages with one reference each.

        Raises:
            OutOfPagesError: fewer are free.
        """
        if count > self.free:
            raise OutOfPagesError(f"{count} pages were asked for, {self.free} of {self.size} are free")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._idle.popitem(last=False)
            self._known[page] = False
            self._forget(page)
        self._references[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to pages that are held or idle."""
        for page in pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference of each page.

        The last page is given back first: of a prompt's idle pages the tail is then evicted before the head, without
        which the tail cannot be found.
        """
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} was released more often than taken"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._known[page]:
                self._idle[page] = None
            else:
                self._free.append(page)

    def quarantine(self, pages: Sequence[int], owner: str) -> None:
        """Give pages back that a remote writer may still write: nobody gets them before ``acquit(owner)``."""
        assert owner not in self._quarantined, f"{owner} has pages in quarantine already"
        for page in pages:
            assert self._references[page] == 1, f"page {page} is shared and cannot be a remote writer's target"
            assert not self._known[page], f"page {page} is cached and cannot be a remote writer's target"
            self._references[page] = 0
        if pages:
            self._quarantined[owner] = list(pages)

    def acquit(self, owner: str) -> int:
        """The writer into ``owner``'s pages is proven to be done: free them. Returns how many there were."""
        pages = self._quarantined.pop(owner, [])
        self._free.extend(pages)
        return len(pages)

    def is_quarantined(self, page: int) -> bool:
        """Whether a write into the page now would be a late one."""
        return any(page in pages for pages in self._quarantined.values())

    def watch_evictions(self, forget: Callable[[int], None]) -> None:
        """Have ``forget(page)`` called when an idle page is given to somebody else."""
        self._forget = forget

    def mark_known(self, page: int) -> None:
        """The cache knows this page's content: keep it idle instead of free when it is released."""
        assert self._references[page] > 0
        self._known[page] = True

    def drop_idle(self) -> int:
        """Forget every idle page. Returns how many there were."""
        dropped = list(self._idle)
        self._idle.clear()
        for page in dropped:
            self._known[page] = False
            self._forget(page)
            self._free.append(page)
        return len(dropped)

    def check(self) -> None:
        """Assert that every page is in exactly one place."""
        held = [page for page, count in enumerate(self._references) if count > 0]
        quarantined = [page for pages in self._quarantined.values() for page in pages]
        places = [*self._free, *self._idle, *held, *quarantined]
        assert sorted(places) == list(range(self.size)), f"pages lost or in two places: {self!r}"
        assert min(self._references, default=0) >= 0
        assert all(self._known[page] for page in self._idle)
        assert not any(self._known[page] for page in (*self._free, *quarantined))

    def __repr__(self) -> str:
        return (
            f"<PagePool {self.size} pages: {len(self._free)} free, {len(self._idle)} idle, {self.held} held,"
            f" {self.quarantined} quarantined>"
        )


class PrefixStats(NamedTuple):
    """Prompt tokens that were looked up in the cache since the start, and those found there."""

    asked_tokens: int
    hit_tokens: int

    @property
    def rate(self) -> float:
        """Share of looked-up tokens that were found, 0 to 1."""
        return self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0


class PrefixCache:
    """Which whole pages of tokens are in the pool already.

    A page is known by a hash of its tokens and of its predecessor's hash, so that equal hashes mean equal contents from
    the first token on. 128 bits of BLAKE2b: a client cannot make two prompts collide and read another's answer.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._asked = 0
        self._hit = 0
        pool.watch_evictions(self._forget)

    @property
    def stats(self) -> PrefixStats:
        """Hits so far."""
        return PrefixStats(self._asked, self._hit)

    def __len__(self) -> int:
        return len(self._page_of)

    def match(self, tokens: NDArray[np.int32], *, limit: int) -> list[int]:
        """Share the longest known run of whole pages from the start of ``tokens``.

        Args:
            tokens: the prompt.
            limit: at most so many tokens are matched; at least one must be left to compute, or there are no logits.
        """
        found: list[int] = []
        for block_hash in self._hashes(tokens[:limit]):
            page = self._page_of.get(block_hash)
            if page is None:
                break
            found.append(page)
        self._pool.share(found)
        return found

    def count(self, asked_tokens: int, hit_tokens: int) -> None:
        """Count one admitted look-up; a look-up that did not lead to an admission is not counted."""
        self._asked += asked_tokens
        self._hit += hit_tokens

    def insert(self, tokens: NDArray[np.int32], pages: Sequence[int]) -> None:
        """Make the whole pages of ``tokens`` known. The caller holds ``pages``; their keys and values are computed."""
        for block_hash, page in zip(self._hashes(tokens), pages, strict=False):
            if block_hash in self._page_of or page in self._hash_of:
                continue  # computed twice at the same time: the first copy stays, the second is freed with its request
            self._page_of[block_hash] = page
            self._hash_of[page] = block_hash
            self._pool.mark_known(page)

    def clear(self) -> int:
        """Forget every page that nobody uses. Returns how many."""
        return self._pool.drop_idle()

    def check(self) -> None:
        """Assert that both directions agree."""
        assert {page: block_hash for block_hash, page in self._page_of.items()} == self._hash_of

    def _forget(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)]

    def _hashes(self, tokens: NDArray[np.int32]) -> Iterable[bytes]:
        size = self._page_size
        parent = b""
        for start in range(0, len(tokens) - size + 1, size):
            parent = hashlib.blake2b(parent + tokens[start : start + size].tobytes(), digest_size=16).digest()
            yield parent

    def __repr__(self) -> str:
        return f"<PrefixCache {len(self)} pages, hit rate {self.stats.rate:.2f}>"
