"""torch.compile on the repeated blocks of a model, so that blocks of one kind share compiled code.

Compiling is the outermost wrapper (after adapters and activation checkpointing), and only passes with a gradient run
compiled: held-out images are evaluated with the same code as on the base model. torch compiles a block on first use, in
the forward pass and again in the backward pass, so missing prerequisites (a compiler, triton, support for an operation)
cause errors there; the loop then repeats the step without compiling.

Not compiled are blocks with adapters that torch cannot capture in one graph (`Adapter.compiles`). Compiled code keeps
the weights of a block until its backward pass, but of offloaded ones only two are on the device at a time; so these are
always recomputed, outside of the compiled code, and fetched before it.
"""

from __future__ import annotations

import contextlib
import functools
import math
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
from lorasmith.adapters.weight_stream import Block, streamed_block
from lorasmith.core.blocks import units
from lorasmith.core.kernels import Kernel
from lorasmith.core.quantization import KERNEL_KINDS, unpacking_on, weight_source
from lorasmith.core.quantized_products import ACTIVATION, has_products, int8_product_on, rounding_on, transposing_on
from lorasmith.core.recomputation import recomputed
from lorasmith.data.dataset import Sample
from lorasmith.families.forms import Routing
from lorasmith.training.memory.activations import without_recomputing
from lorasmith.training.memory.backward_passes import rotation_on
from lorasmith.training.memory.fused_blocks import kernels_on

BACKEND = "inductor"
"""Backend of torch.compile, one of `torch.compiler.list_backends()`."""

_VARIANTS = 256
"""Compiled variants of one block (sizes, layers with and without gradient) before torch silently stops compiling it."""


def compilable(adapters: Sequence[Adapter]) -> bool:
    """Whether torch can compile a block with these adapters."""
    return all(part.compiles for adapter in adapters for part in adapter.modules() if isinstance(part, Adapter))


def sizes_vary(samples: Sequence[Sample], routing: Routing | None) -> bool:
    """Whether samples differ in the shapes of the inputs of the denoiser's blocks.

    Blocks that tokens are routed around know the number of tokens, but neither height nor width.
    """

    def sizes(sample: Sample) -> tuple[object, ...]:
        latents, tensors = sample.latents, [tensor for _, tensor in sorted(sample.conditioning.tensors.items())]
        if routing is None:
            return latents.shape, *(tensor.shape for tensor in tensors)
        return math.prod(routing.grid(latents.shape)), *(tensor.numel() for tensor in tensors)

    return len({sizes(sized) for sample in samples for sized in sample.sizes()}) > 1


def compiler(device: torch.device) -> str:
    """Name and version of the compiler for a device, for records; `none` if it is not installed."""
    if device.type == "cuda":
        for name in ("triton", "triton-windows", "pytorch-triton-rocm"):
            with contextlib.suppress(PackageNotFoundError):
                return f"triton {version(name)}"
        return "none"
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl"):  # torch's own order
        if path := shutil.which(name):
            output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return output.partition("\n")[0] or name
    return "none"


def triton_kernels(device: torch.device) -> tuple[Kernel, ...]:
    """The project's kernels for a GPU, each tried on it; none for other devices."""
    if device.type != "cuda":
        return ()
    found = [rotation_on(device), kernels_on(device), *(unpacking_on(device, kind) for kind in KERNEL_KINDS)]
    if has_products("int8", device):
        found += [int8_product_on(device), rounding_on(device, torch.int8), transposing_on(device)]
    if has_products("fp8", device):
        found.append(rounding_on(device, ACTIVATION))
    return tuple(found)


@contextlib.contextmanager
def blocks_compiled(model: nn.Module, enabled: bool, *, varying_sizes: bool = False) -> Iterator[None]:
    """Inside the context, blocks of `model`, adapters and checkpointing in place, run compiled, if `enabled`.

    `varying_sizes` compiles once for all sizes of latents, a little slower, instead of once per size.
    """
    if not enabled:
        yield
        return
    from torch import _dynamo, _functorch

    with contextlib.ExitStack() as undo:
        limits = {"recompile_limit": _VARIANTS, "accumulated_recompile_limit": 16 * _VARIANTS}
        undo.enter_context(_dynamo.config.patch(limits))
        if any(weight_source(layer) is not None for layer in model.modules()):
            # The backward pass unpacks weights again; torch would eliminate it as a common subexpression and keep them.
            undo.enter_context(_functorch.config.patch(cse=False))
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"torch\.")  # on compiling, where users can do nothing
        for block in units(model):
            if not compilable([adapter for layer in block.modules() for adapter in adapters_on(layer)]):
                continue
            own, weights = block.__dict__.get("forward"), streamed_block(block)
            undo.callback(restore_forward, block, own)
            # Blocks that are kept on the device share the code of the others.
            forward, is_recomputed = (block.forward, False) if weights is None else without_recomputing(block.forward)
            forward = _Compiled(forward, _caller((_kind(block), varying_sizes)), dynamic=varying_sizes)
            if weights is not None and (is_recomputed or not weights.is_kept):
                forward = types.MethodType(recomputed, functools.partial(_fetched_first, weights, forward))
            block.forward = forward
        yield


def _fetched_first(weights: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    weights.fetch()
    return forward(*args, **kwargs)


class _Compiled:
    """A forward that is compiled on its first call with a gradient."""

    def __init__(self, forward: Callable[..., Any], code: types.FunctionType, *, dynamic: bool) -> None:
        self._forward = forward
        # Blocks share the code of a function, but torch before 2.10 compiles each bound method anew.
        self._called = (forward.__func__, forward.__self__) if isinstance(forward, types.MethodType) else (forward,)
        self._code = code
        self._dynamic = dynamic
        self._run: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if self._run is None:
            self._run = torch.compile(self._code, backend=BACKEND, dynamic=self._dynamic)
        return self._run(*self._called, *args, **kwargs)


@functools.cache
def _caller(kind: object) -> types.FunctionType:
    """A function that calls its first argument, one per kind of block, as torch caches compiled code by code object."""

    def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), globals(), call.__name__)


def _kind(block: nn.Module) -> object:
    parts = tuple((path, type(part), tuple(map(type, adapters_on(part)))) for path, part in block.named_modules())
    return parts, tuple(parameter.shape for parameter in block.parameters())
