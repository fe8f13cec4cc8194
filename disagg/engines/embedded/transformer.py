"""The forward pass: new tokens in, logits out, keys and values into a paged pool.

One step takes a *segment* per sequence: some new tokens, and the pages that hold the sequence's keys and values. Decode
segments (one token) and prefill chunks mix freely:

1. The tokens of all segments are the rows of one matrix; every dense layer is one matrix product.
2. Keys (after rotation) and values of the new tokens are written into their pages.
3. Attention reads the pages back, so it computes from exactly what a handoff sends. Chunks go one by one, in tiles of
   scores that fit into the CPU's caches; decode segments go in groups of similar length.
4. Only the rows that somebody asked for meet the output matrix.

The pool is (pages, layers, 2, page_size, kv_heads, head_dim): all of a page is one contiguous range of bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from disagg.engines.embedded.step import Chunk, Group, Indices, Segment, Step, plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg.engines.embedded.checkpoint import Checkpoint, Floats, LayerWeights, Rope

__all__ = ["Segment", "Transformer", "rope_frequencies"]

# One tile of attention scores, in floats: 1 MiB, so that it stays in a core's caches between the two products.
_TILE = 256 * 1024
# Rows of a tile at most: more would be wasted on the future of each other, fewer on repacking keys.
_TILE_ROWS = 128
# Keys of one decode group, in floats; as many again for the values. Larger ones fall out of the caches between being
# read from the pages and being used, smaller ones cost more calls.
_GROUP = 256 * 1024
# Scores whose exponentials are neither huge nor tiny.
_EXP_SAFE = 60.0


class _Places(NamedTuple):
    """A step's plan in terms of the arrays.

    Attributes:
        slots: per row, where its key of layer 0 goes, the pool seen as rows of (kv_heads * head_dim).
        cos, sin: of the row's position, (rows, 1, 2, head_dim / 2); the sine's first half is negated.
    """

    step: Step
    slots: Indices
    cos: Floats
    sin: Floats


class _Scratch:
    """Memory for intermediate results, kept from call to call.

    Fresh arrays of this size would come from the kernel and go back to it each time; the page faults took a tenth of
    the time of a prefill, and at times half of a decode step.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, Floats] = {}

    def take(self, name: str, *shape: int) -> Floats:
        """An array with any content; valid until the same name is taken again."""
        size = math.prod(shape)
        array = self._arrays.get(name)
        if array is None or array.size < size:
            array = self._arrays[name] = np.empty(size, np.float32)
        return array[:size].reshape(shape)


class Transformer:
    """Llama, Qwen2 and Qwen3 in float32. Holds weights and scratch memory, no state of any sequence.

    Not to be called from two threads at once: the scratch memory is shared.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self._weights = checkpoint
        self._frequencies = rope_frequencies(checkpoint.config.rope, checkpoint.config.head_dim)
        self._scale = np.float32(1 / math.sqrt(checkpoint.config.head_dim))
        self._scratch = _Scratch()
        self._sharing = checkpoint.config.heads // checkpoint.config.kv_heads  # query heads per key head
        self._future = _future(_TILE_ROWS)

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

        Raises:
            IndexError: a segment's pages are not in the pool or do not cover its tokens; nothing was written.
        """
        places = self._place(segments, kv)
        step = places.step
        kv[step.begun] = 0
        # Overflow in exp is a gate at its end (0 or 1); NaN, from broken pages, is noticed by the sampler.
        with np.errstate(over="ignore", invalid="ignore"):
            x = self._weights.embedding[step.tokens]
            for index, layer in enumerate(self._weights.layers):
                x += self._attention(layer, index, self._norm(x, layer.attention_norm), places, kv)
                x += self._mlp(layer, self._norm(x, layer.mlp_norm))
            x = self._norm(x[step.wanted], self._weights.final_norm)
            logits: Floats = x @ self._weights.lm_head.T
        return np.split(logits, np.cumsum(step.wanted_counts)[:-1])

    def _place(self, segments: Sequence[Segment], kv: Floats) -> _Places:
        page_size, width = kv.shape[3], kv.shape[4] * kv.shape[5]
        step = plan(segments, page_size=page_size, pool_pages=len(kv), group_tokens=_GROUP // width)
        angles = step.positions.astype(np.float32)[:, None] * self._frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        return _Places(
            step=step,
            slots=step.pages * (2 * self.config.layers * page_size) + step.positions % page_size,
            cos=np.stack((cos, cos), axis=1)[:, None],
            sin=np.stack((-sin, sin), axis=1)[:, None],
        )

    # --- dense layers -----------------------------------------------------------------------------------------------

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        """RMS norm over the last axis."""
        squares: Floats = np.vecdot(x, x)[..., None]
        squares /= x.shape[-1]
        squares += self.config.norm_eps
        np.sqrt(squares, out=squares)
        x = x / squares
        x *= weight
        return x

    def _linear(self, name: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        y = np.matmul(x, weight.T, out=self._scratch.take(name, len(x), len(weight)))
        if bias is not None:
            y += bias
        return y

    def _mlp(self, layer: LayerWeights, x: Floats) -> Floats:
        """The gated feed-forward layer, SwiGLU: down(silu(gate(x)) * up(x))."""
        gate_up = self._linear("gate_up", x, layer.gate_up, layer.gate_up_bias)
        width = self.config.mlp
        gate = gate_up[:, :width]
        hidden = self._scratch.take("mlp", len(x), width)
        np.negative(gate, out=hidden)
        np.exp(hidden, out=hidden)
        hidden += 1
        np.divide(gate, hidden, out=hidden)
        hidden *= gate_up[:, width:]
        return self._linear("output", hidden, layer.down, layer.down_bias)

    def _rotate(self, heads: Floats, places: _Places) -> None:
        """Rotary embedding in place: element i pairs with element i + head_dim / 2."""
        halves = heads.reshape(*heads.shape[:2], 2, -1)
        swapped = self._scratch.take("swapped", *halves.shape)
        np.multiply(halves[:, :, ::-1], places.sin, out=swapped)
        halves *= places.cos
        halves += swapped

    # --- attention --------------------------------------------------------------------------------------------------

    def _attention(self, layer: LayerWeights, index: int, x: Floats, places: _Places, kv: Floats) -> Floats:
        """Attention of layer ``index``: (rows, hidden) to (rows, hidden); writes the new keys and values."""
        c = self.config
        qkv = self._linear("qkv", x, layer.qkv, layer.qkv_bias).reshape(len(x), -1, c.head_dim)
        q, k, v = np.split(qkv, (c.heads, c.heads + c.kv_heads), axis=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q[...] = self._norm(q, layer.q_norm)
            k[...] = self._norm(k, layer.k_norm)
        self._rotate(qkv[:, : c.heads + c.kv_heads], places)
        rows = kv.reshape(-1, c.kv_heads, c.head_dim)
        slots = places.slots + index * 2 * kv.shape[3]
        rows[slots] = k
        rows[slots + kv.shape[3]] = v
        q *= self._scale
        out = self._scratch.take("attended", len(x), c.heads * c.head_dim)
        for chunk in places.step.chunks:
            here = slice(chunk.first, chunk.first + chunk.length)
            self._attend_chunk(q[here], index, chunk, kv, out[here])
        for group in places.step.groups:
            out[group.rows] = self._attend_group(q[group.rows], index, group, kv)
        return self._linear("output", out, layer.output, layer.output_bias)

    def _read_pages(self, pages: Indices, index: int, kv: Floats) -> tuple[Floats, Floats]:
        """Keys and values of layer ``index``, copied out of the pages: each (*pages.shape, page_size, heads, dim)."""
        blocks = kv.reshape(-1, *kv.shape[3:])
        at = pages * (2 * self.config.layers) + 2 * index
        shape = (*pages.shape, *kv.shape[3:])
        # mode="clip" because "raise" would fill a copy first; plan() has checked the ids.
        keys = blocks.take(at, axis=0, out=self._scratch.take("keys", *shape), mode="clip")
        values = blocks.take(at + 1, axis=0, out=self._scratch.take("values", *shape), mode="clip")
        return keys, values

    def _attend_chunk(self, q: Floats, index: int, chunk: Chunk, kv: Floats, out: Floats) -> None:
        """Causal attention of one chunk: q is (length, heads, dim), out (length, heads * dim)."""
        c = self.config
        keys, values = (a.reshape(-1, c.kv_heads, c.head_dim) for a in self._read_pages(chunk.pages, index, kv))
        height = max(1, min(_TILE_ROWS, _TILE // (chunk.start + chunk.length)) // self._sharing)
        for at in range(0, chunk.length, height):
            here = slice(at, min(at + height, chunk.length))
            seen = chunk.start + here.stop  # keys that the last query of this tile may see
            for head in range(c.kv_heads):
                shared = slice(head * self._sharing, (head + 1) * self._sharing)
                mixed = self._attend_tile(q[here, shared], keys[:seen, head], values[:seen, head])
                out[here, shared.start * c.head_dim : shared.stop * c.head_dim] = mixed

    def _attend_tile(self, q: Floats, keys: Floats, values: Floats) -> Floats:
        """The last n positions of a sequence, for the query heads that share a key head.

        Takes q (n, sharing, dim), keys and values (tokens, dim); gives (n, sharing * dim).
        """
        n, sharing, dim = q.shape
        scores = self._scratch.take("scores", n * sharing, len(keys))
        np.matmul(q.reshape(n * sharing, dim), keys.T, out=scores)
        scores.reshape(n, sharing, -1)[:, :, -n:] += self._future[:n, :, :n]
        total = _exponentiate(scores)
        mixed: Floats = scores @ values
        mixed /= total
        return mixed.reshape(n, sharing * dim)

    def _attend_group(self, q: Floats, index: int, group: Group, kv: Floats) -> Floats:
        """One new token each of several sequences: q is (sequences, heads, dim), the result (sequences, heads * dim)."""
        c = self.config
        shape = (len(q), -1, c.kv_heads, 1, c.head_dim)
        keys, values = (a.reshape(shape).transpose(0, 2, 3, 1, 4) for a in self._read_pages(group.pages, index, kv))
        # Matrix times vector, head by head: BLAS would first repack a matrix to multiply it with two or four rows. The
        # heads that share a key head follow each other, so its keys are still in the cache.
        scores: Floats = (keys @ q.reshape(len(q), c.kv_heads, self._sharing, c.head_dim, 1))[..., 0]
        scores += group.mask
        total = _exponentiate(scores)
        mixed: Floats = (scores[..., None, :] @ values)[..., 0, :]
        mixed /= total
        return mixed.reshape(len(q), -1)


def _exponentiate(scores: Floats) -> Floats:
    """Softmax over the last axis in place, but for the division: returns the sums, shape (..., 1).

    Dividing the mixed values instead of the scores saves a pass over the larger array. So does subtracting the maximum
    only where exp needs it: exp(60) is 1e26, so thousands of them still add up, and exp(-60) is far from vanishing.
    """
    best = scores.max(axis=-1, keepdims=True)
    if not (best.max() < _EXP_SAFE and best.min() > -_EXP_SAFE):
        scores -= best
    np.exp(scores, out=scores)
    total: Floats = scores @ np.ones((scores.shape[-1], 1), np.float32)
    return total


def _future(size: int) -> Floats:
    """(size, 1, size): -inf where a query would see a later key, 0 elsewhere."""
    mask = np.full((size, size), -np.inf, np.float32)
    return np.triu(mask, k=1)[:, None, :]


def rope_frequencies(rope: Rope, head_dim: int) -> Floats:
    """Radians per token for each of the head_dim / 2 pairs; float32 throughout, as transformers computes them.

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
