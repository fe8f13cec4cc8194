from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from disagg.engines.embedded.checkpoint import Rope, load_checkpoint, load_config
from disagg.engines.folder import model_hash
from disagg.errors import StartError

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 3,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "rope_theta": 1000.0,
}
SHAPES = {
    "model.embed_tokens.weight": (10, 8),
    "model.norm.weight": (8,),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.self_attn.k_proj.bias": (4,),
    "model.layers.0.self_attn.v_proj.bias": (4,),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
}
QKV_ROWS = 16

Arrays = dict[str, NDArray[np.float32]]


def arrays() -> Arrays:
    chance = np.random.default_rng(0)
    # Halves of small integers: exact in every storage type.
    return {name: np.asarray(chance.integers(-9, 9, shape) / 2, np.float32) for name, shape in SHAPES.items()}


def stored(array: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "BF16":
        return (array.view(np.uint32) >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: Arrays, dtype: str = "F32") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        begin, data = len(data), data + stored(array, dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_config(folder: Path, **changes: Any) -> None:
    fields = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", arrays())
    return tmp_path


def replace_weights(folder: Path, changes: Any = (), *, dtype: str = "F32") -> None:
    tensors = {name: array for name, array in {**arrays(), **dict(changes)}.items() if array is not None}
    write_safetensors(folder / "model.safetensors", tensors, dtype)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_storage_type_becomes_float32(folder: Path, dtype: str) -> None:
    replace_weights(folder, dtype=dtype)
    loaded, expected = load_checkpoint(folder), arrays()
    (layer,) = loaded.layers
    prefix = "model.layers.0."
    parts = [expected[f"{prefix}self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    assert layer.qkv.dtype == np.float32
    assert np.array_equal(layer.qkv, np.concatenate(parts))
    assert layer.qkv_bias is not None
    assert len(layer.qkv_bias) == QKV_ROWS
    gate_up = [expected[f"{prefix}mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
    assert np.array_equal(layer.gate_up, np.concatenate(gate_up))
    assert np.array_equal(layer.down, expected[f"{prefix}mlp.down_proj.weight"])
    assert np.array_equal(layer.mlp_norm, expected[f"{prefix}post_attention_layernorm.weight"])
    assert layer.output_bias is None
    assert loaded.lm_head is loaded.embedding


def test_shards_are_put_together(folder: Path) -> None:
    whole = load_checkpoint(folder)
    names = sorted(SHAPES)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (folder / "model.safetensors").unlink()
    for file, members in shards.items():
        write_safetensors(folder / file, {name: arrays()[name] for name in members}, "F16")
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(load_checkpoint(folder).layers[0].qkv, whole.layers[0].qkv)
    (folder / "b.safetensors").unlink()
    with pytest.raises(StartError, match=r"b\.safetensors"):
        load_checkpoint(folder)


def test_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    config = load_config(folder)
    assert (config.heads, config.kv_heads, config.head_dim, config.mlp) == (2, 1, 4, 12)
    assert config.eos_ids == (3, 5)
    assert config.rope == Rope(theta=1000.0)
    assert config.stored_dtype == "bfloat16"
    assert config.kv_page_shape(16) == (1, 2, 16, 1, 4)
    assert config.kv_token_bytes == 32


def test_llama3_rope_in_both_spellings(folder: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 32}
    write_config(folder, rope_scaling={"rope_type": "llama3", **scaling})
    old = load_config(folder)
    write_config(folder, rope_theta=..., rope_parameters={"rope_type": "llama3", "rope_theta": 1000.0, **scaling})
    assert load_config(folder) == old
    assert old.rope == Rope(1000.0, 8.0, 1.5, 3.0, 32)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": None}, "None"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "linear"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["sliding_attention"]}, "sliding"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "share"),
        ({"head_dim": 5}, "odd"),
        ({"num_hidden_layers": 0}, "layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": ...}, "hidden_size"),
    ],
)
def test_models_that_are_refused(folder: Path, changes: dict[str, Any], word: str) -> None:
    write_config(folder, **changes)
    with pytest.raises(StartError, match=word) as caught:
        load_checkpoint(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model.norm.weight": None}, r"model\.norm\.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": None}, r"q_proj\.bias"),
        ({"model.layers.0.self_attn.v_proj.weight": np.zeros((3, 8), np.float32)}, "rows"),
        ({"model.layers.0.self_attn.v_proj.weight": np.zeros((5, 8), np.float32)}, "v_proj"),
        ({"model.norm.weight": np.zeros((9,), np.float32)}, r"model\.norm"),
        ({"model.embed_tokens.weight": np.zeros((10, 9), np.float32)}, "embed_tokens"),
        ({"model.layers.1.mlp.gate_proj.weight": np.zeros((1, 1), np.float32)}, r"layers\.1"),
    ],
)
def test_weights_that_do_not_fit_the_config(folder: Path, changes: Any, word: str) -> None:
    replace_weights(folder, changes)
    with pytest.raises(StartError, match=word):
        load_checkpoint(folder)


def test_harmless_leftovers(folder: Path) -> None:
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    replace_weights(folder, {rotary: np.zeros(2, np.float32), "lm_head.weight": np.zeros((10, 8), np.float32)})
    load_checkpoint(folder)


def test_other_storage_types_are_refused(folder: Path) -> None:
    replace_weights(folder, dtype="F64")
    with pytest.raises(StartError, match="F64"):
        load_checkpoint(folder)


def test_damaged_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    good = path.read_bytes()
    wrong_size = good.replace(b'"shape": [10, 8]', b'"shape": [10, 7]')
    for bad in (b"", good[:4], good[:100], good[:-1], b"\xff" * 64, b"\x02" + bytes(7) + b"[]", wrong_size):
        path.write_bytes(bad)
        with pytest.raises(StartError, match=r"model\.safetensors"):
            load_checkpoint(folder)
        path.write_bytes(good)
    path.unlink()
    with pytest.raises(StartError, match=r"model\.safetensors"):
        load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(StartError, match=r"config\.json"):
        load_checkpoint(folder)


def test_an_index_cannot_point_out_of_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../secret"}}')
    with pytest.raises(StartError, match="weight_map"):
        load_checkpoint(folder)


def test_the_hash_tells_models_apart(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    first = model_hash(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert model_hash(copy) == first
    assert len(first) == 16
    assert int(first, 16) >= 0
    seen = {first}
    (copy / "tokenizer.json").write_text('{"a": 1}')
    seen.add(model_hash(copy))
    write_config(copy, rope_theta=1.0)
    seen.add(model_hash(copy))
    replace_weights(copy, {"model.norm.weight": np.ones(8, np.float32)})  # a fine-tune: same headers, other weights
    seen.add(model_hash(copy))
    assert len(seen) == 4
