"""Reads a Hugging Face model folder into float32 arrays.

Families: Llama, Qwen2 and Qwen3 (dense). Everything that would change the arithmetic and is not implemented is refused
by name: an engine that answers with wrong numbers is worse than one that does not start.

The safetensors format is read here, not through the library of that name, because its NumPy side has no bfloat16:
eight bytes of header length (little endian), a JSON header that gives dtype, shape and byte range of each tensor, then
the bytes. (Source: the format section of the safetensors README.)
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from disagg.engines.folder import decode_json, read_header, weight_files
from disagg.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Floats = NDArray[np.float32]
T = TypeVar("T")

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class Rope(msgspec.Struct, frozen=True):
    """Rotary position embedding: plain (``factor`` 1) or stretched as Llama 3.1 does.

    Attributes:
        theta: base of the frequencies.
        factor: how much the low frequencies are slowed down.
        low_freq_factor: wavelengths over ``original_context / low_freq_factor`` are slowed down wholly.
        high_freq_factor: wavelengths under ``original_context / high_freq_factor`` are left alone.
        original_context: tokens of context that the model was trained with before the stretch.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


class ModelConfig(msgspec.Struct, frozen=True):
    """What the arithmetic and the scheduler need to know of a model.

    Attributes:
        family: a key of ``FAMILIES``.
        mlp: width of the gated feed-forward layer (``intermediate_size``).
        max_context: prompt and answer together, tokens.
        eos_ids: tokens that end an answer: config.json's and generation_config.json's, sorted.
        qkv_bias, output_bias, mlp_bias: which matrices carry a bias.
        qk_norm: queries and keys are normalised per head before rotation (Qwen3).
        tied: the output matrix is the embedding.
        stored_dtype: what the files hold, for display; the arithmetic is float32.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab_size: int
    max_context: int
    norm_eps: float
    rope: Rope
    eos_ids: tuple[int, ...]
    bos_id: int | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    stored_dtype: str

    def kv_page_shape(self, page_size: int) -> tuple[int, int, int, int, int]:
        """Shape of one page: (layers, K and V, tokens, kv heads, head dim). The pool is (pages, *this), float32."""
        return (self.layers, 2, page_size, self.kv_heads, self.head_dim)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of KV cache that one token takes."""
        return 4 * math.prod(self.kv_page_shape(1))


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are (out, in) as Hugging Face stores them; ``x @ w.T`` applies one.

    ``qkv`` stacks query, key and value rows, ``gate_up`` gate and up rows: one matrix product each instead of three
    and two.
    """

    attention_norm: Floats
    qkv: Floats
    qkv_bias: Floats | None
    q_norm: Floats | None
    k_norm: Floats | None
    output: Floats
    output_bias: Floats | None
    mlp_norm: Floats
    gate_up: Floats
    gate_up_bias: Floats | None
    down: Floats
    down_bias: Floats | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in memory: float32, each weight once.

    Attributes:
        embedding: (vocab, hidden).
        lm_head: (vocab, hidden); the same array as ``embedding`` in a tied model.
    """

    config: ModelConfig
    embedding: Floats
    layers: tuple[LayerWeights, ...]
    final_norm: Floats
    lm_head: Floats


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads config.json, generation_config.json and *.safetensors.

    Raises:
        StartError: the folder is incomplete or damaged, or holds a model that is not supported.
    """
    config = load_config(folder)
    tensors = _Tensors(folder)
    checkpoint = _assemble(config, tensors)
    tensors.refuse_leftovers(config)
    return checkpoint


# --- config.json ----------------------------------------------------------------------------------------------------


class _RopeFields(msgspec.Struct):
    """``rope_scaling`` of older transformers, ``rope_parameters`` of newer ones."""

    rope_type: str | None = None
    type: str | None = None  # before rope_type
    rope_theta: float | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float = 1.0

    def kind(self) -> str:
        return self.rope_type or self.type or "default"


class _ConfigFile(msgspec.Struct):
    """The fields of config.json that matter, with the defaults that transformers gives them."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    architectures: list[str] | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_theta: float | None = None
    rope_scaling: _RopeFields | None = None
    rope_parameters: _RopeFields | None = None
    partial_rotary_factor: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None  # before dtype


class _GenerationFile(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def load_config(folder: Path) -> ModelConfig:
    """Reads config.json and generation_config.json only.

    Raises:
        StartError: a file is missing or damaged, or the model is not supported.
    """
    # The type first: of another family even the types of the fields may differ, and its name is the better message.
    kind = decode_json(folder / "config.json", dict[str, Any]).get("model_type")
    if kind not in FAMILIES:
        raise StartError(
            f"{folder / 'config.json'}: model_type {kind!r} is not supported by the embedded engine, which knows "
            f"{', '.join(FAMILIES)}; serve it with SGLang"
        )
    file = decode_json(folder / "config.json", _ConfigFile)
    _refuse_unsupported(file, folder)
    config = _to_config(file, _eos_ids(file, folder), folder)
    _refuse_impossible(config, folder)
    return config


def _to_config(file: _ConfigFile, eos_ids: tuple[int, ...], folder: Path) -> ModelConfig:
    default_head_dim = 128 if file.model_type == "qwen3" else file.hidden_size // max(1, file.num_attention_heads)
    return ModelConfig(
        family=file.model_type,
        layers=file.num_hidden_layers,
        hidden=file.hidden_size,
        heads=file.num_attention_heads,
        kv_heads=file.num_key_value_heads or file.num_attention_heads,
        head_dim=file.head_dim or default_head_dim,
        mlp=file.intermediate_size,
        vocab_size=file.vocab_size,
        max_context=file.max_position_embeddings,
        norm_eps=file.rms_norm_eps,
        rope=_rope(file, folder),
        eos_ids=eos_ids,
        bos_id=file.bos_token_id,
        qkv_bias=file.attention_bias or file.model_type == "qwen2",
        output_bias=file.attention_bias and file.model_type != "qwen2",
        mlp_bias=file.mlp_bias and file.model_type == "llama",
        qk_norm=file.model_type == "qwen3",
        tied=file.tie_word_embeddings,
        stored_dtype=file.dtype or file.torch_dtype or "float32",
    )


def _refuse_unsupported(file: _ConfigFile, folder: Path) -> None:
    where = folder / "config.json"
    wanted = FAMILIES[file.model_type]
    if file.architectures and file.architectures != [wanted]:
        raise StartError(f"{where}: architecture {file.architectures[0]!r} is not supported, only {wanted}; use SGLang")
    if file.quantization_config is not None:
        raise StartError(f"{where}: quantized weights are not supported; use the 16-bit folder of this model")
    if file.hidden_act != "silu":
        raise StartError(f"{where}: hidden_act {file.hidden_act!r} is not supported, only silu; serve it with SGLang")
    other_layers = set(file.layer_types or ()) - {"full_attention"}
    if file.use_sliding_window or other_layers:
        raise StartError(f"{where}: sliding-window attention is not supported; serve this model with SGLang")


def _refuse_impossible(config: ModelConfig, folder: Path) -> None:
    where = folder / "config.json"
    sizes = ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab_size", "max_context")
    for name in sizes:
        if getattr(config, name) < 1:
            raise StartError(f"{where}: {name} is {getattr(config, name)}, must be at least 1")
    if config.heads % config.kv_heads:
        raise StartError(f"{where}: {config.heads} attention heads cannot share {config.kv_heads} key/value heads")
    if config.head_dim % 2:
        raise StartError(f"{where}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")


def _rope(file: _ConfigFile, folder: Path) -> Rope:
    where = folder / "config.json"
    fields = file.rope_parameters or file.rope_scaling or _RopeFields()
    theta = fields.rope_theta or file.rope_theta or 10_000.0
    if fields.kind() not in {"default", "llama3"}:
        raise StartError(f"{where}: rope type {fields.kind()!r} is not supported, only default and llama3; use SGLang")
    if fields.partial_rotary_factor != 1.0 or file.partial_rotary_factor != 1.0:
        raise StartError(f"{where}: partial rotary embeddings are not supported; serve this model with SGLang")
    if fields.kind() == "default":
        return Rope(theta=theta)
    return Rope(
        theta=theta,
        factor=fields.factor,
        low_freq_factor=fields.low_freq_factor,
        high_freq_factor=fields.high_freq_factor,
        original_context=fields.original_max_position_embeddings or file.max_position_embeddings,
    )


def _eos_ids(file: _ConfigFile, folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = decode_json(path, _GenerationFile) if path.is_file() else _GenerationFile()
    ids: set[int] = set()
    for found in (file.eos_token_id, generation.eos_token_id):
        ids.update([found] if isinstance(found, int) else found or ())
    return tuple(sorted(ids))


# --- *.safetensors --------------------------------------------------------------------------------------------------


class _TensorHeader(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Stored(NamedTuple):
    path: Path
    bytes_: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Tensors:
    """All tensors of a folder by name, mapped, read once each, straight into float32."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: dict[str, _Stored] = {}
        self._used: set[str] = set()
        for path in weight_files(folder):
            self._map(path)

    def _map(self, path: Path) -> None:
        header, start, size = read_header(path)
        try:
            entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
            entries.pop("__metadata__", None)
            tensors = {name: msgspec.json.decode(raw, type=_TensorHeader) for name, raw in entries.items()}
        except msgspec.MsgspecError as error:
            raise StartError(f"{path} has a damaged header: {error}; download it again") from error
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, tensor in tensors.items():
            begin, end = tensor.data_offsets
            if not 0 <= begin <= end <= size - start:
                raise StartError(f"{path} is cut short: tensor {name} lies outside of it; download it again")
            self._stored[name] = _Stored(path, mapped, tensor.dtype, tuple(tensor.shape), start + begin)
            if tensor.dtype in _DTYPES and end - begin != math.prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize:
                raise StartError(f"{path}: tensor {name} has {end - begin} bytes, not what its shape needs")

    def read(self, shape: tuple[int, ...], *names: str) -> Floats:
        """The named tensors, stacked along their first axis, as one float32 array of exactly ``shape``.

        Raises:
            StartError: a tensor is missing, or has a dtype or shape that the config does not announce.
        """
        out = np.empty(shape, np.float32)
        row = 0
        for name in names:
            stored = self._find(name)
            if stored.shape[1:] != shape[1:] or row + stored.shape[0] > shape[0]:
                raise StartError(f"{stored.path}: tensor {name} has shape {stored.shape}; config.json announces another")
            _convert(stored, out[row : row + stored.shape[0]])
            row += stored.shape[0]
        if row != shape[0]:
            raise StartError(f"{self._folder}: {' + '.join(names)} have {row} rows; config.json announces {shape[0]}")
        return out

    def _find(self, name: str) -> _Stored:
        self._used.add(name)
        stored = self._stored.get(name)
        if stored is None:
            raise StartError(f"{self._folder}: tensor {name} is missing; the model folder is incomplete")
        if stored.dtype not in _DTYPES or not stored.shape:
            raise StartError(f"{stored.path}: tensor {name} is stored as {stored.dtype}; F32, F16 and BF16 are read")
        return stored

    def refuse_leftovers(self, config: ModelConfig) -> None:
        """A weight that nothing reads means another model than config.json says.

        Two are harmless: rotary tables of old Llama folders, and the copy of the embedding in some tied ones.
        """
        harmless = {"lm_head.weight"} if config.tied else set()
        for name in sorted(self._stored.keys() - self._used - harmless):
            if not name.endswith("rotary_emb.inv_freq"):
                raise StartError(f"{self._stored[name].path}: tensor {name} has no place in a {config.family} model; use SGLang")


def _convert(stored: _Stored, out: Floats) -> None:
    raw = np.frombuffer(stored.bytes_, _DTYPES[stored.dtype], count=out.size, offset=stored.offset).reshape(out.shape)
    if stored.dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        np.left_shift(raw, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = raw


def _assemble(config: ModelConfig, tensors: _Tensors) -> Checkpoint:
    table = (config.vocab_size, config.hidden)
    embedding = tensors.read(table, "model.embed_tokens.weight")
    return Checkpoint(
        config=config,
        embedding=embedding,
        layers=tuple(_assemble_layer(config, tensors, f"model.layers.{i}.") for i in range(config.layers)),
        final_norm=tensors.read((config.hidden,), "model.norm.weight"),
        lm_head=embedding if config.tied else tensors.read(table, "lm_head.weight"),
    )


def _assemble_layer(config: ModelConfig, tensors: _Tensors, prefix: str) -> LayerWeights:
    def read(shape: tuple[int, ...], module: str, names: Sequence[str], kind: str = "weight") -> Floats:
        return tensors.read(shape, *(f"{prefix}{module}{name}.{kind}" for name in names))

    attention, mlp = "self_attn.", "mlp."
    hidden, width = config.hidden, config.heads * config.head_dim
    rows, qkv = width + 2 * config.kv_heads * config.head_dim, ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_proj", "up_proj")
    return LayerWeights(
        attention_norm=read((hidden,), "", ("input_layernorm",)),
        qkv=read((rows, hidden), attention, qkv),
        qkv_bias=read((rows,), attention, qkv, "bias") if config.qkv_bias else None,
        q_norm=read((config.head_dim,), attention, ("q_norm",)) if config.qk_norm else None,
        k_norm=read((config.head_dim,), attention, ("k_norm",)) if config.qk_norm else None,
        output=read((hidden, width), attention, ("o_proj",)),
        output_bias=read((hidden,), attention, ("o_proj",), "bias") if config.output_bias else None,
        mlp_norm=read((hidden,), "", ("post_attention_layernorm",)),
        gate_up=read((2 * config.mlp, hidden), mlp, gate_up),
        gate_up_bias=read((2 * config.mlp,), mlp, gate_up, "bias") if config.mlp_bias else None,
        down=read((hidden, config.mlp), mlp, ("down_proj",)),
        down_bias=read((hidden,), mlp, ("down_proj",), "bias") if config.mlp_bias else None,
    )
