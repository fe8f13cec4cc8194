"""Models with random weights, in memory, for tests that need arithmetic and no meaning."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from disagg.engines.embedded.checkpoint import Checkpoint, Floats, LayerWeights, ModelConfig, Rope
from disagg.engines.embedded.transformer import Segment, Transformer

Pages = NDArray[np.intp]
SMALL = ModelConfig(
    family="llama",
    layers=2,
    hidden=32,
    heads=6,
    kv_heads=2,
    head_dim=16,
    mlp=48,
    vocab_size=96,
    max_context=4096,
    norm_eps=1e-6,
    rope=Rope(),
    eos_ids=(),
    bos_id=None,
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tied=True,
    stored_dtype="float32",
)


def random_checkpoint(config: ModelConfig = SMALL, *, seed: int = 0, scale: float = 0.3) -> Checkpoint:
    chance = np.random.default_rng(seed)

    def random(*shape: int) -> Floats:
        return chance.standard_normal(shape, np.float32) * np.float32(scale)

    def layer() -> LayerWeights:
        heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        return LayerWeights(
            attention_norm=1 + random(config.hidden),
            qkv=random(heads + 2 * kv, config.hidden),
            qkv_bias=random(heads + 2 * kv),
            q_norm=1 + random(config.head_dim),
            k_norm=1 + random(config.head_dim),
            output=random(config.hidden, heads),
            output_bias=None,
            mlp_norm=1 + random(config.hidden),
            gate_up=random(2 * config.mlp, config.hidden),
            gate_up_bias=None,
            down=random(config.hidden, config.mlp),
            down_bias=None,
        )

    embedding = random(config.vocab_size, config.hidden)
    layers = tuple(layer() for _ in range(config.layers))
    return Checkpoint(config, embedding, layers, 1 + random(config.hidden), embedding)


class Pool:
    """A transformer and a pool full of NaN: whatever is read before it was written shows."""

    def __init__(self, checkpoint: Checkpoint, *, tokens: int = 4096, page_size: int = 16, seed: int = 0) -> None:
        self.transformer = Transformer(checkpoint)
        self.page_size = page_size
        pages = -(-tokens // page_size)
        self.kv = np.full((pages, *checkpoint.config.kv_page_shape(page_size)), np.nan, np.float32)
        self._free = list(np.random.default_rng(seed).permutation(pages))

    def pages(self, tokens: int) -> Pages:
        """Scattered pages for a sequence of up to so many tokens."""
        needed = -(-tokens // self.page_size)
        taken, self._free = self._free[:needed], self._free[needed:]
        assert len(taken) == needed, "the test's pool is too small"
        return np.array(taken, np.intp)

    def forward(self, *segments: Segment) -> list[Floats]:
        return self.transformer.forward(segments, self.kv)

    def prefill(self, tokens: NDArray[np.int32], pages: Pages, chunk: int, *, all_logits: bool = False) -> Floats:
        """Chunk by chunk; logits of the last position, or of every one."""
        parts = [self.forward(Segment(tokens[at : at + chunk], at, pages, all_logits))[0] for at in range(0, len(tokens), chunk)]
        return np.concatenate(parts) if all_logits else parts[-1]


def random_tokens(count: int, vocab_size: int = SMALL.vocab_size, *, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, vocab_size, count, dtype=np.int32)
