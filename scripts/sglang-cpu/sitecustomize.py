"""Lets the SGLang wheel, which is built for CUDA, run on a PyTorch that knows only the CPU. For development, tests and a first look.

`scripts/install-sglang-cpu` copies this folder into the environment that it makes; disagg puts it first on PYTHONPATH of the engines that
it starts there, and of nothing else. Four things are missing without an accelerator; each gets the smallest thing that will do:

- the schemas of torchvision's compiled operators, which `import torchvision` refines;
- pinned host memory, which PyTorch refuses to make where there is nothing to pin it for;
- CUDA events and streams, which the Mooncake sender waits on;
- `sgl_kernel`, imported everywhere and called only where a GPU computes (see the package beside this file).
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

MAKERS = ("empty", "empty_like", "full", "ones", "tensor", "zeros")
OPERATORS = ("nms", "qnms")
FIRST = frozenset({"sglang", "torchvision"})


class PastEvent:
    """A CUDA event where every operation has ended by the time its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def adapt(torch: Any) -> None:
    for name in OPERATORS:
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in MAKERS:
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor
    torch.cuda.Event = PastEvent
    torch.cuda.current_stream = lambda *_: None


def _unpinned(maker: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return maker(*args, **kwargs)

    return make


class OnFirstImport(importlib.abc.MetaPathFinder):
    """Adapts PyTorch the moment somebody is about to need it, so that helpers which never do start quickly."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname in FIRST:
            sys.meta_path.remove(self)
            import torch  # noqa: PLC0415

            adapt(torch)


sys.meta_path.insert(0, OnFirstImport())
