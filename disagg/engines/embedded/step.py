"""What one forward pass computes, and where everything of it goes: worked out once, used by every layer.

The tokens of all sequences stand below each other as rows. Prefill chunks attend one by one; decode segments (one token
each) attend in groups of similar length, padded to the longest of the group.

Padding is masked, not skipped, and 0 x NaN is NaN: so whoever begins a page clears it (``begun``), and no leftover of
the page's earlier owner, a broken transfer say, can leak into another sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg.engines.embedded.checkpoint import Floats

Integers = NDArray[np.integer]
Indices = NDArray[np.intp]


class Segment(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        tokens: ids to compute, shape (n,), n >= 1.
        start: how many tokens of the sequence are in the pool already.
        pages: page ids that cover ``start + n`` tokens, in order; more are allowed.
        all_logits: logits for each of the n positions instead of the last only.
    """

    tokens: Integers
    start: int
    pages: Sequence[int] | Integers
    all_logits: bool = False


class Chunk(NamedTuple):
    """A segment of several tokens: rows [first, first + length) of the step; ``pages`` is cut to what they cover."""

    first: int
    length: int
    start: int
    pages: Indices


class Group(NamedTuple):
    """Decode segments of similar length.

    Attributes:
        rows: their rows in the step.
        pages: (sequences, pages), padded with the sequence's own last page.
        mask: (sequences, 1, 1, tokens), 0 where a token is, -inf where padding is.
    """

    rows: Indices
    pages: Indices
    mask: Floats


class Step(NamedTuple):
    """A step's plan.

    Attributes:
        tokens: ids, (rows,).
        positions: of each row in its own sequence.
        pages: of each row, the page that its key and value go to; the slot in it is position modulo page size.
        begun: pages that this step begins and leaves unfilled.
        wanted: rows whose logits are wanted, by segment.
        wanted_counts: how many of them each segment has.
    """

    tokens: Integers
    positions: Indices
    pages: Indices
    begun: Indices
    chunks: list[Chunk]
    groups: list[Group]
    wanted: Indices
    wanted_counts: list[int]


class _Table(NamedTuple):
    """The segments by column: lengths, and all page lists in one array, segment i's from ``offsets[i]``."""

    starts: Indices
    counts: Indices
    firsts: Indices
    pages: Indices
    offsets: Indices


def plan(segments: Sequence[Segment], *, page_size: int, pool_pages: int, group_tokens: int) -> Step:
    """Works out a step.

    Args:
        segments: at least one.
        page_size: tokens per page.
        pool_pages: pages of the pool.
        group_tokens: how many tokens, padding included, a decode group may hold; one sequence may always.

    Raises:
        IndexError: pages that are not in the pool, or too few of them.
    """
    table = _tabulate(segments, page_size, pool_pages)
    ends = table.starts + table.counts
    last = (ends - 1) // page_size
    unfilled = (last * page_size >= table.starts) & (ends % page_size != 0)
    positions = np.arange(table.counts.sum()) + np.repeat(table.starts - table.firsts, table.counts)
    wanted_counts = [len(segment.tokens) if segment.all_logits else 1 for segment in segments]
    wanted_from = table.firsts + table.counts - wanted_counts
    return Step(
        tokens=np.concatenate([segment.tokens for segment in segments]),
        positions=positions,
        pages=table.pages[np.repeat(table.offsets, table.counts) + positions // page_size],
        begun=table.pages[(table.offsets + last)[unfilled]],
        chunks=[_chunk(table, int(i), page_size) for i in np.flatnonzero(table.counts > 1)],
        groups=_groups(table, np.flatnonzero(table.counts == 1), page_size, group_tokens),
        wanted=_ranges(wanted_from, np.asarray(wanted_counts)),
        wanted_counts=wanted_counts,
    )


def _tabulate(segments: Sequence[Segment], page_size: int, pool_pages: int) -> _Table:
    counts = np.array([len(segment.tokens) for segment in segments], np.intp)
    starts = np.array([segment.start for segment in segments], np.intp)
    sizes = np.array([len(segment.pages) for segment in segments], np.intp)
    if (sizes * page_size < starts + counts).any() or not counts.all():
        raise IndexError("a segment has no tokens, or fewer pages than its tokens need")
    pages = np.concatenate([segment.pages for segment in segments])
    if pages.min() < 0 or pages.max() >= pool_pages:
        raise IndexError(f"a segment names a page outside of the pool of {pool_pages}")
    return _Table(starts, counts, counts.cumsum() - counts, pages.astype(np.intp), sizes.cumsum() - sizes)


def _chunk(table: _Table, i: int, page_size: int) -> Chunk:
    start, length, offset = int(table.starts[i]), int(table.counts[i]), int(table.offsets[i])
    needed = -(-(start + length) // page_size)
    return Chunk(int(table.firsts[i]), length, start, table.pages[offset : offset + needed])


def _groups(table: _Table, members: Indices, page_size: int, group_tokens: int) -> list[Group]:
    """The members by falling length, cut where a group is full."""
    lengths = table.starts[members] + 1
    order = np.argsort(-lengths, kind="stable")
    groups = []
    while order.size:
        longest = -(-int(lengths[order[0]]) // page_size)
        size = max(1, group_tokens // (longest * page_size))
        chosen, order = order[:size], order[size:]
        groups.append(_pad(table, members[chosen], longest, page_size))
    return groups


def _pad(table: _Table, members: Indices, longest: int, page_size: int) -> Group:
    lengths = (table.starts[members] + 1)[:, None]
    at = np.minimum(np.arange(longest), (lengths - 1) // page_size)
    padding = np.arange(longest * page_size) >= lengths
    mask = np.where(padding, np.float32(-np.inf), np.float32(0))
    return Group(table.firsts[members], table.pages[table.offsets[members][:, None] + at], mask[:, None, None, :])


def _ranges(firsts: Indices, counts: Indices) -> Indices:
    """[first, first + count) for each, joined."""
    return np.arange(counts.sum()) + np.repeat(firsts - (counts.cumsum() - counts), counts)
