"""Stands where SGLang imports its GPU kernels from. A CPU engine never calls one; whoever does is told so."""

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a GPU kernel, and this engine computes on a CPU")

    absent.__name__ = name
    return absent
