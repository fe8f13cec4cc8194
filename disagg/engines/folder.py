"""A Hugging Face model folder: its files, and a hash that tells one model from another. Reads them; loads nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from disagg.errors import StartError

T = TypeVar("T")

_HEADER_LIMIT = 100_000_000  # the format's own limit; anything larger is not a safetensors file
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def model_hash(folder: Path) -> str:
    """16 hex digits that differ between models: prefill and decode must agree on them before they pair.

    Covers config.json, tokenizer.json, the safetensors headers and index, and 16 samples of 4 KiB of each weight file,
    because the headers of a model and of its fine-tune are the same. Costs milliseconds, whatever the model's size.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        path = folder / name
        digest.update(f"{name}\0".encode())
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    for path in weight_files(folder):
        header, start, size = read_header(path)
        digest.update(f"{path.name}\0{size}\0".encode() + header)
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(start + (size - start) * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """The weight files: those that the index names, or the single one.

    Raises:
        StartError: there are none in the safetensors format.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = decode_json(index, dict[str, Any]).get("weight_map")
        if not isinstance(shards, dict) or any("/" in str(name) for name in shards.values()):
            raise StartError(f"{index} has no usable weight_map; download the folder again")
        return [folder / name for name in sorted(set(shards.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise StartError(f"{folder} holds no model.safetensors; only the safetensors format is read")


def read_header(path: Path) -> tuple[bytes, int, int]:
    """The JSON header as bytes, where the data starts, and the file's size.

    Raises:
        StartError: it is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= _HEADER_LIMIT else b""
            size = path.stat().st_size
    except OSError as error:
        raise StartError(f"{path} cannot be read ({error.strerror}); the model folder is incomplete") from error
    if not header or len(header) != length:
        raise StartError(f"{path} is not a safetensors file or is cut short; download it again")
    return header, 8 + length, size


def decode_json(path: Path, kind: type[T]) -> T:
    """A JSON file of a model folder.

    Raises:
        StartError: it is missing or makes no sense.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise StartError(f"{path} is missing; point the engine at a Hugging Face model folder") from None
    except OSError as error:
        raise StartError(f"{path} cannot be read ({error.strerror}); check the folder's permissions") from error
    except msgspec.MsgspecError as error:
        raise StartError(f"{path} is not what a model folder holds: {error}; download the folder again") from error
