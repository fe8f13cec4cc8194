"""The forward pass: new tokens in, logits out, keys and values into a paged pool.

A step takes one *segment* per sequence: some new tokens, and the pages that hold the sequence's keys and values. Decode
segments (one token) and prefill chunks mix freely:

1. The tokens of all segments stand below each other as one matrix; every dense layer is one matrix product.
2. Keys (after rotation) and values of the new tokens are written into their pages.
3. Attention reads the pages back, so it sees exactly what a handoff would send. Chunks go one by one, in tiles of
   queries that fit into the CPU's cache; decode segments of similar length go together.
4. Only the rows that somebody asked for meet the output matrix.

The pool is (pages, layers, 2, page_size, kv_heads, head_dim): all of a page is one contiguous range of bytes.

Padding is masked, not skipped, and 0 x NaN is NaN: so whoever begins a page clears it, and no leftover of a page's
earlier owner (a broken transfer, say) can leak into another sequence.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg.engines.embedded.checkpoint import Checkpoint, Floats, LayerWeights, Rope

Integers = NDArray[np.integer]

# One tile of attention scores, in floats: 1 MiB, so that it stays in a core's L2/L3 cache between the two products.
_TILE = 256 * 1024
# Keys of one decode group, in floats (as many again for the values).
_GROUP = 128 * 1024


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


class _Chunk(NamedTuple):
    """A segment of several tokens: rows [first, first + length) of the step."""

    first: int
    length: int
    start: int
    pages: NDArray[np.intp]


class _Group(NamedTuple):
    """Decode segments of similar length, padded to the longest.

    Attributes:
        rows: their rows in the step.
        pages: (sequences, pages), padded with the sequence's own first page.
        mask: (sequences, 1, 1, tokens), 0 where a token is, -inf where padding is.
    """

    rows: NDArray[np.intp]
    pages: NDArray[np.intp]
    mask: Floats


class _Step(NamedTuple):
    """Where everything of one step goes; the same for all layers.

    Attributes:
        slots: per token, its row in layer 0's keys, the pool seen as rows of (kv_heads * head_dim).
        cos, sin: (tokens, 1, 2, head_dim / 2); the sine's first half is negated.
        wanted: rows whose logits are wanted.
    """

    tokens: Integers
    slots: NDArray[np.intp]
    cos: Floats
    sin: Floats
    chunks: list[_Chunk]
    groups: list[_Group]
    wanted: NDArray[np.intp]


class Transformer:
    """Llama, Qwen2 and Qwen3 in float32. Holds weights and scratch memory, no state of any sequence.

    Not to be called from two threads at once: the scratch memory is shared.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self._weights = checkpoint
        self._frequencies = rope_frequencies(checkpoint.config.rope, checkpoint.config.head_dim)
        self._scale = np.float32(1 / math.sqrt(checkpoint.config.head_dim))
        self._tile = np.empty(_TILE, np.float32)

    def __repr__(self) -> str:
        c = self.config
        return f"<Transformer {c.family} layers={c.layers} hidden={c.hidden} heads={c.heads}/{c.kv_heads}>"

    def forward(self, segments: Sequence[Segment], kv: Floats) -> list[Floats]:
        """Computes one step.

        Args:
            segments: at least one; no two may write the same page.
            kv: the pool, (pages, layers, 2, page_size, kv_heads, head_dim), C-contiguous. Written in place.

        Returns:
            Per segment, logits of shape (1, vocab), or (n, vocab) where ``all_logits`` is set.
        """
        # Overflow in exp is a gate at its end (0 or 1); NaN, from broken pages, is noticed by the sampler.
        with np.errstate(over="ignore", invalid="ignore"):
            step = self._plan(segments, kv)
            x = self._weights.embedding[step.tokens]
            for index, layer in enumerate(self._weights.layers):
                x += self._attention(layer, index, self._norm(x, layer.attention_norm), step, kv)
                x += _mlp(layer, self._norm(x, layer.mlp_norm))
            x = self._norm(x[step.wanted], self._weights.final_norm)
            return _split(x @ self._weights.lm_head.T, segments)

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        """RMS norm over the last axis."""
        squares: Floats = np.vecdot(x, x)[..., None]
        squares /= x.shape[-1]
        squares += self.config.norm_eps
        np.sqrt(squares, out=squares)
        x = x / squares
        x *= weight
        return x

    # --- the plan of a step -----------------------------------------------------------------------------------------

    def _plan(self, segments: Sequence[Segment], kv: Floats) -> _Step:
        page_size = kv.shape[3]
        tables = [np.asarray(s.pages, np.intp) for s in segments]
        counts = np.array([len(s.tokens) for s in segments])
        starts = np.array([s.start for s in segments])
        firsts = np.cumsum(counts) - counts
        positions = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
        pages = np.concatenate(
            [
                table[positions[first : first + count] // page_size]
                for table, first, count in zip(tables, firsts, counts, strict=True)
            ]
        )
        for segment, table in zip(segments, tables, strict=True):
            _clear_begun_page(segment, table, kv)
        angles = positions.astype(np.float32)[:, None] * self._frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        return _Step(
            tokens=np.concatenate([s.tokens for s in segments]),
            slots=pages * (2 * self.config.layers * page_size) + positions % page_size,
            cos=np.stack((cos, cos), axis=1)[:, None],
            sin=np.stack((-sin, sin), axis=1)[:, None],
            chunks=[
                _Chunk(int(first), int(count), int(start), table[: -(-(int(start) + int(count)) // page_size)])
                for first, count, start, table in zip(firsts, counts, starts, tables, strict=True)
                if count > 1
            ],
            groups=self._group(firsts[counts == 1], starts[counts == 1] + 1, tables, counts, page_size),
            wanted=_wanted_rows(segments, firsts, counts),
        )

    def _group(
        self,
        rows: NDArray[np.intp],
        lengths: NDArray[np.intp],
        tables: list[NDArray[np.intp]],
        counts: NDArray[np.intp],
        page_size: int,
    ) -> list[_Group]:
        """Decode segments by falling length, cut into groups whose keys fit the scratch memory."""
        decodes = [table for table, count in zip(tables, counts, strict=True) if count == 1]
        order = np.argsort(-lengths, kind="stable")
        groups: list[_Group] = []
        while order.size:
            longest = -(-int(lengths[order[0]]) // page_size)
            size = max(1, _GROUP // (longest * page_size * self.config.kv_heads * self.config.head_dim))
            chosen, order = order[:size], order[size:]
            groups.append(_pad(rows[chosen], lengths[chosen], [decodes[i] for i in chosen], longest, page_size))
        return groups

    # --- one layer --------------------------------------------------------------------------------------------------

    def _attention(self, layer: LayerWeights, index: int, x: Floats, step: _Step, kv: Floats) -> Floats:
        """Attention of layer ``index``: (tokens, hidden) to (tokens, hidden); writes the new keys and values."""
        c = self.config
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        qkv = _linear(x, layer.qkv, layer.qkv_bias)
        heads = qkv.reshape(len(x), c.heads + 2 * c.kv_heads, c.head_dim)
        q, k = heads[:, : c.heads], heads[:, c.heads : c.heads + c.kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            q[...] = self._norm(q, layer.q_norm)
            k[...] = self._norm(k, layer.k_norm)
        _rotate(heads[:, : c.heads + c.kv_heads], step)
        rows = kv.reshape(-1, keys)
        slots = step.slots + index * 2 * kv.shape[3]
        rows[slots] = qkv[:, queries : queries + keys]
        rows[slots + kv.shape[3]] = qkv[:, queries + keys :]
        q *= self._scale
        out = np.empty((len(x), queries), np.float32)
        for chunk in step.chunks:
            self._attend_chunk(q, index, chunk, kv, out)
        for group in step.groups:
            self._attend_group(q, index, group, kv, out)
        return _linear(out, layer.output, layer.output_bias)

    def _read_pages(self, pages: NDArray[np.intp], index: int, kv: Floats) -> tuple[Floats, Floats]:
        """Keys and values of layer ``index``, copied out of the pages: each (*pages.shape, page_size, heads, dim)."""
        blocks = kv.reshape(-1, *kv.shape[3:])
        at = pages * (2 * self.config.layers) + 2 * index
        return blocks.take(at, axis=0), blocks.take(at + 1, axis=0)

    def _attend_chunk(self, q: Floats, index: int, chunk: _Chunk, kv: Floats, out: Floats) -> None:
        c = self.config
        sharing = c.heads // c.kv_heads
        k, v = (a.reshape(-1, c.kv_heads, c.head_dim) for a in self._read_pages(chunk.pages, index, kv))
        rows = max(16, _TILE // (sharing * (chunk.start + chunk.length)))
        for at in range(0, chunk.length, rows):
            count = min(rows, chunk.length - at)
            past = chunk.start + at
            here = slice(chunk.first + at, chunk.first + at + count)
            mask = _causal(count)
            for head in range(c.kv_heads):
                shared = slice(head * sharing, (head + 1) * sharing)
                query = q[here, shared].reshape(count * sharing, c.head_dim)
                scores = self._scores((count * sharing, past + count))
                np.matmul(query, k[: past + count, head].T, out=scores)
                scores.reshape(count, sharing, -1)[:, :, past:] += mask
                total = _exponentiate(scores)
                mixed = scores @ v[: past + count, head]
                mixed /= total
                out[here, shared.start * c.head_dim : shared.stop * c.head_dim] = mixed.reshape(count, -1)

    def _scores(self, shape: tuple[int, int]) -> Floats:
        """Scratch memory for one tile."""
        size = shape[0] * shape[1]
        if size > self._tile.size:  # a context of more than _TILE / 16 tokens
            self._tile = np.empty(size, np.float32)
        return self._tile[:size].reshape(shape)

    def _attend_group(self, q: Floats, index: int, group: _Group, kv: Floats, out: Floats) -> None:
        c = self.config
        count = len(group.rows)
        k, v = (a.reshape(count, -1, c.kv_heads, c.head_dim) for a in self._read_pages(group.pages, index, kv))
        query = q[group.rows].reshape(count, c.kv_heads, -1, c.head_dim)
        scores = query @ k.transpose(0, 2, 3, 1)
        scores += group.mask
        total = _exponentiate(scores)
        mixed = scores @ v.transpose(0, 2, 1, 3)
        mixed /= total
        out[group.rows] = mixed.reshape(count, -1)


def rope_frequencies(rope: Rope, head_dim: int) -> Floats:
    """Radians per token for each of the head_dim / 2 pairs; float32, as transformers computes them.

    Llama 3.1's stretch slows a pair by ``factor`` when its wavelength is long compared with the context that the model
    was trained with, leaves short ones alone, and blends in between.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1) / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.factor == 1.0:
        return plain
    turns = rope.original_context * plain / np.float32(2 * math.pi)
    span = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip((turns - np.float32(rope.low_freq_factor)) / span, 0, 1)
    stretched: Floats = kept * plain + (1 - kept) * plain / np.float32(rope.factor)
    return stretched.astype(np.float32)


def _linear(x: Floats, weight: Floats, bias: Floats | None) -> Floats:
    y: Floats = x @ weight.T
    if bias is not None:
        y += bias
    return y


def _mlp(layer: LayerWeights, x: Floats) -> Floats:
    """The gated feed-forward layer, SwiGLU: down(silu(gate(x)) * up(x))."""
    gate_up = _linear(x, layer.gate_up, layer.gate_up_bias)
    width = gate_up.shape[1] // 2
    gate = gate_up[:, :width]
    sigmoid = np.negative(gate)
    np.exp(sigmoid, out=sigmoid)
    sigmoid += 1
    np.divide(gate, sigmoid, out=sigmoid)
    sigmoid *= gate_up[:, width:]
    return _linear(sigmoid, layer.down, layer.down_bias)


def _rotate(heads: Floats, step: _Step) -> None:
    """Rotary embedding in place: element i pairs with element i + head_dim / 2."""
    halves = heads.reshape(*heads.shape[:2], 2, -1)
    swapped = halves[:, :, ::-1] * step.sin
    halves *= step.cos
    halves += swapped


def _exponentiate(scores: Floats) -> Floats:
    """Softmax over the last axis in place, but for the division: returns the sums, shape (..., 1).

    Dividing the mixed values instead of the scores saves a pass over the larger array.
    """
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total: Floats = scores @ np.ones((scores.shape[-1], 1), np.float32)
    return total


def _causal(count: int) -> Floats:
    """(count, 1, count): -inf above the diagonal, 0 elsewhere."""
    future = np.arange(count)[None, :] > np.arange(count)[:, None]
    return np.where(future, np.float32(-np.inf), np.float32(0))[:, None, :]


def _clear_begun_page(segment: Segment, pages: NDArray[np.intp], kv: Floats) -> None:
    """Zeroes the last page that the segment writes, when this segment begins it and leaves it unfilled."""
    page_size = kv.shape[3]
    end = segment.start + len(segment.tokens)
    begun = (end - 1) // page_size
    if begun * page_size >= segment.start and end % page_size:
        kv[pages[begun]] = 0


def _pad(
    rows: NDArray[np.intp],
    lengths: NDArray[np.intp],
    tables: list[NDArray[np.intp]],
    longest: int,
    page_size: int,
) -> _Group:
    pages = np.empty((len(rows), longest), np.intp)
    for i, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        needed = -(-int(length) // page_size)
        pages[i, :needed] = table[:needed]
        pages[i, needed:] = table[0]
    padding = np.arange(longest * page_size) >= lengths[:, None]
    mask = np.where(padding, np.float32(-np.inf), np.float32(0))
    return _Group(rows, pages, mask[:, None, None, :])


def _wanted_rows(segments: Sequence[Segment], firsts: Integers, counts: Integers) -> NDArray[np.intp]:
    return np.concatenate(
        [
            np.arange(first if segment.all_logits else first + count - 1, first + count)
            for segment, first, count in zip(segments, firsts, counts, strict=True)
        ]
    )


def _split(logits: Floats, segments: Sequence[Segment]) -> list[Floats]:
    sizes = [len(s.tokens) if s.all_logits else 1 for s in segments]
    return np.split(logits, np.cumsum(sizes)[:-1])
