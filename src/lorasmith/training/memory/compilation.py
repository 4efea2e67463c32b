"""Compiled blocks: torch.compile on the blocks that a model repeats, so that one piece of code serves many of them.

Compiling goes around all else (adapters, then recomputed blocks, then this), and only passes with a gradient run
compiled: held-out images are measured on the code that measured the base model. torch compiles when a block is first
used, in the forward pass and again in the backward pass, so what is missing for it (a compiler, triton, support for an
operation) shows there; the loop then takes the step again without.

Left as they are: blocks with adapters that torch cannot take in one piece (`Adapter.compiles`), and all of them where
weights are streamed in, since that is work for the host between any two layers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.inject import adapters_on, restore_forward
from lorasmith.core.quantization import weight_source
from lorasmith.data.dataset import Sample
from lorasmith.training.memory.activation_checkpointing import blocks_at_depth

__all__ = ["BACKEND", "compilable", "compiled", "compiler", "sizes_vary", "units"]

BACKEND = "inductor"
"""What turns graphs into code, of `torch.compiler.list_backends()`."""

_VARIANTS = 256
"""Variants of one block's code (sizes, layers with and without a gradient) before torch gives up on it silently."""


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks that are compiled one by one.

    They are the outermost repeated blocks. Where those are stages, which hold lists of blocks themselves and differ
    from each other (as in a UNet), they are the blocks of the stages.
    """
    found: list[nn.Module] = []
    for block in blocks_at_depth(model, 1):
        found += blocks_at_depth(block, 1) if _is_stage(block) else [block]
    return found


def compilable(adapters: Sequence[Adapter]) -> bool:
    """Whether a block with these adapters can be compiled."""
    return all(part.compiles for one in adapters for part in one.modules() if isinstance(part, Adapter))


def sizes_vary(samples: Sequence[Sample]) -> bool:
    """Whether samples differ in the shapes that a denoiser sees."""
    return len({(one.latents.shape, *_shapes(one)) for one in samples}) > 1


def compiler(device: torch.device) -> str:
    """What makes the code on a device, with its version; `none` where it is not installed."""
    if device.type == "cuda":
        for name in ("triton", "triton-windows", "pytorch-triton-rocm"):
            with contextlib.suppress(PackageNotFoundError):
                return f"triton {version(name)}"
        return "none"
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl"):  # torch's own order
        if path := shutil.which(name):
            told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return told.partition("\n")[0] or name
    return "none"


@contextlib.contextmanager
def compiled(model: nn.Module, wanted: bool, *, varying_sizes: bool = False) -> Iterator[None]:
    """Run the blocks of `model` compiled while inside, where `wanted`.

    Args:
        model: with everything else already in place.
        wanted: False does nothing.
        varying_sizes: make code that takes any size of latents, which compiles once but runs a little slower; else
            there is code for each size.
    """
    if not wanted:
        yield
        return
    from torch import _dynamo, _functorch

    with contextlib.ExitStack() as undo:
        undo.enter_context(_dynamo.config.patch(_limits(_dynamo.config)))
        if any(weight_source(layer) is not None for layer in model.modules()):
            # The backward pass makes weights anew; torch would find that it is the same twice, and keep the first.
            undo.enter_context(_functorch.config.patch(cse=False))
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"torch\.")  # on how it compiles, which nobody here can change
        for block in units(model):
            if not compilable([one for layer in block.modules() for one in adapters_on(layer)]):
                continue
            own = block.__dict__.get("forward")
            undo.callback(restore_forward, block, own)
            block.forward = _Compiled(block.forward, _caller((_kind(block), varying_sizes)), dynamic=varying_sizes)
        yield


def _limits(config: object) -> dict[str, int]:
    """torch's limits on variants of code, by the names that they have had since 2.7 or had before."""
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    return {name: _VARIANTS, f"accumulated_{name}": 16 * _VARIANTS}


class _Compiled:
    """A forward that is compiled when it is first used with a gradient."""

    def __init__(self, forward: Callable[..., Any], code: types.FunctionType, *, dynamic: bool) -> None:
        self._forward = forward
        self._code = code
        self._dynamic = dynamic
        self._run: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if self._run is None:
            self._run = torch.compile(self._code, backend=BACKEND, dynamic=self._dynamic)
        return self._run(self._forward, *args, **kwargs)


@functools.cache
def _caller(kind: object) -> types.FunctionType:
    """A function that calls its first argument, one for each kind of block.

    torch looks compiled code up by code object. So blocks of a kind share theirs, are not looked up among others, and
    find it again when the model comes back from a preview.
    """

    def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), globals(), call.__name__)


def _kind(block: nn.Module) -> object:
    """Equal for blocks that one piece of code serves."""
    parts = tuple((path, type(part), tuple(map(type, adapters_on(part)))) for path, part in block.named_modules())
    return parts, tuple(parameter.shape for parameter in block.parameters())


def _is_stage(block: nn.Module) -> bool:
    lists = (child for child in block.children() if isinstance(child, nn.ModuleList))
    return any(next(element.children(), None) is not None for one in lists for element in one)


def _shapes(sample: Sample) -> list[torch.Size]:
    return [tensor.shape for _, tensor in sorted(sample.conditioning.tensors.items())]
