"""What an engine's log says while it starts, and when it ends: one clause for people. Pure.

SGLang says what it does in lines of its log and in nothing else, and when it fails it prints a page of stack from each of its processes.
The tables below know what such pages mean; what they do not know is told by the last line that names an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LIMIT = 240

_Patterns = Sequence[tuple[re.Pattern[str], str]]


def _table(*rows: tuple[str, str]) -> _Patterns:
    return [(re.compile(pattern, re.IGNORECASE), text) for pattern, text in rows]


_PHASES = _table(
    (r"server_args=", "it reads its settings"),
    (r"Init parallel begin", "it sets up its ranks"),
    (r"Load weight begin", "it loads the weights"),
    (r"(?:Loading safetensors|loading) (?:checkpoint )?shards:\s+(\d+)% Completed", r"it loads the weights, \1 %"),
    (r"Load weight end", "the weights are loaded"),
    (r"KV Cache is allocated", "its KV pool is allocated"),
    (r"Capture [\w -]*cuda graph begin", "it captures CUDA graphs"),
    (r"Capturing batches.*?(\d+)%", r"it captures CUDA graphs, \1 %"),
    (r"Capture [\w -]*cuda graph end", "its CUDA graphs are captured"),
    (r"Start of (?:pd disaggregation )?warmup|Uvicorn running on", "it warms up"),
    (r"fired up and ready", "it is ready"),
)


def progress(text: str) -> str:
    """How far a start has come, as its log says; empty when that says nothing yet."""
    found, at = "", -1
    for pattern, phase in _PHASES:
        for match in pattern.finditer(text):
            if match.start() >= at:
                found, at = match.expand(phase), match.start()
    return found


_STUCK = _table(
    (
        r"\[Errno 98\].*?\('([^']+)', (\d+)\).*address already in use",
        r"port \2 on \1 is taken by another program: stop that, or give the engine other ports",
    ),
)


def hopeless(text: str) -> str:
    """Why a start that goes on cannot succeed any more; empty when it can. SGLang does not end when its HTTP port is taken."""
    return _first(_STUCK, text)


_CAUSES = _table(
    *((row[0].pattern, row[1]) for row in _STUCK),
    (r"address already in use", "one of its ports is taken by another program: stop that, or give the engine other ports"),
    (r"error: unrecognized arguments: (.+)", r"it does not know the arguments \1: check engine_args, and which release this is"),
    (r"error: (argument .+)", r"it refuses an \1"),
    (r"error: the following arguments are required: (.+)", r"it lacks the arguments \1"),
    (
        r"OutOfMemoryError: (.+)|CUDA out of memory|HIP out of memory",
        "it ran out of GPU memory: lower engine.mem_fraction, give it more GPUs with tp_size, or a smaller model",
    ),
    (
        r"Not enough memory[^\n]*|Loading the model used too much memory",
        "the model leaves no memory for a KV pool: raise engine.mem_fraction, or give it more GPUs with tp_size",
    ),
    (r"MemoryError|Cannot allocate memory|DefaultCPUAllocator: can't allocate memory", "this machine has no memory left for it"),
    (
        r"Repo id must be in the form[^']*'repo_name' or 'namespace/repo_name': '([^']+)'",
        r"the model folder \1 is not there: give one with --model",
    ),
    (
        r"(\S+) is not a local folder and is not a valid model identifier",
        r"the model \1 is neither a folder here nor a model that can be looked up: give one with --model",
    ),
    (
        r"(\S+) does not appear to have a file named (\S+)",
        r"the model folder \1 has no \2: give a Hugging Face folder with --model",
    ),
    (
        r"install NIXL|install mooncake|No module named '(?:mooncake|nixl|mori)[^']*'|Please install (?:nixl|mooncake|mori)",
        "its KV transfer backend is not installed: install it, or choose another engine.transfer_backend",
    ),
    (
        r"(lib\S+\.so[.\d]*): cannot open shared object file",
        r"the system library \1 is missing (libibverbs1 and librdmacm1 are Mooncake's): install its package",
    ),
    (
        r"_cuda_setDevice|Found no NVIDIA driver|No CUDA GPUs are available|no CUDA-capable device|CUDA driver version is insuff",
        "it finds no usable GPU on this host: check the driver with nvidia-smi, or set engine.device",
    ),
    (r"invalid device ordinal|CUDA_VISIBLE_DEVICES", "one of its GPUs is not there: check `gpus` of its entry in [[engines]]"),
    (r"No module named '?sglang'?", "SGLang is not installed in its Python: set engine.sglang_python, or install it (docs/gpu.md)"),
    (r"NCCL error|ncclUnhandledCudaError", "its ranks cannot talk to each other (NCCL): see its log"),
    (
        r"pool memory leak detected|token_to_kv_pool_allocator memory leak",
        "it found that pages of its KV pool were lost, and ended itself",
    ),
    (r"watchdog timeout(?!.*soft=True)", "a step of its scheduler took too long, and its own watchdog ended it"),
)
_ERROR_LINE = re.compile(r"^(?:\[[^\]]*\]\s*)?((?:[A-Za-z_][\w.]*\.)?(?:[A-Z]\w*)?(?:Error|Exception)\b:?.*)$", re.MULTILINE)


_LASTING = re.compile(
    r"error: unrecognized arguments|error: argument |arguments are required|Repo id must be in the form|valid model identifier"
    r"|does not appear to have a file named|install NIXL|install mooncake|No module named|cannot open shared object file|_cuda_setDevice"
    r"|Found no NVIDIA driver|invalid device ordinal"
)
_HARMLESS = re.compile(r"^.*Ignore import error when loading .*$", re.MULTILINE)
"""SGLang tries every model that it knows at each start, and says which of them lack a package: of no account for this one."""


def is_lasting(text: str) -> bool:
    """Whether another start with the same settings must end in the same way; false where that is not certain."""
    return _LASTING.search(_HARMLESS.sub("", text)) is not None


def why(text: str, code: int | None) -> str:
    """Why an engine ended, as its log and its exit code say.

    Args:
        text: the end of its log, of this life only, without secrets.
        code: negative for a signal; None where it is not known.
    """
    text = _HARMLESS.sub("", text)
    known = _first(_CAUSES, text)
    if known:
        return known
    errors = _ERROR_LINE.findall(text)
    if errors:
        return _short(errors[-1])
    if code == -9 and "kill_process_tree" not in text:
        return "somebody killed it, or this machine ran out of memory (see `journalctl -k`)"
    lines = text.strip().splitlines()
    return _short(lines[-1].strip()) if lines else "its log says nothing"


def _first(table: _Patterns, text: str) -> str:
    for pattern, clause in table:
        match = pattern.search(text)
        if match:
            return _short(match.expand(clause))
    return ""


def _short(text: str) -> str:
    return text if len(text) <= LIMIT else f"{text[: LIMIT - 3]}..."
