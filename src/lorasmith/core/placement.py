"""Devices and number formats, and placing a model on them inside a context."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import OptionError
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.processes import current
from lorasmith.core.quantization import WEIGHT_SOURCE, Packed, placeholder, weight_source

__all__ = [
    "FULL_PRECISION",
    "best_device",
    "chosen_device",
    "device_of",
    "memory_format_for",
    "placed",
    "product_dtype",
    "reproducible",
    "sampling_dtype",
]


FULL_PRECISION = "full_precision"
"""Attribute of a module, True if its own parameters and buffers are placed in fp32 whatever the dtype of the others."""


_ALIGNMENT = 64
"""Bytes by which torch aligns what it allocates; tensors on memory-mapped files lie where the file's header ends."""


def best_device() -> torch.device:
    """The first CUDA device, or the CPU; of several processes on a machine, each has a CUDA device of its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda") if current().size == 1 else torch.device("cuda", current().gpu)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module that is on one."""
    return next(module.parameters()).device


def chosen_device(name: str | torch.device | None) -> torch.device:
    """A device by its name, such as `cuda:1`; the first CUDA device, or the CPU, if None.

    Raises:
        OptionError: there is no such device here.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        assert device.type != "meta"  # has no numbers
    except (RuntimeError, AssertionError) as error:  # torch raises the second where it was built without CUDA
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise OptionError(f"device must be one that is here ({there}), got {str(name)!r}; name one of these") from error
    return device


def product_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device has instructions for it, else fp32: emulated bf16 products take three times as long."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.9
        native = any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def sampling_dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    """fp32 on CPUs, whose 16-bit products are slow or inaccurate; on GPUs the dtype of the weights."""
    return torch.float32 if device.type == "cpu" else next(module.parameters()).dtype


def memory_format_for(module: nn.Module) -> torch.memory_format:
    """Channels-last for models with 2-D convolutions larger than 1×1, which is faster."""
    convolutional = any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in module.modules())
    return torch.channels_last if convolutional else torch.contiguous_format


@contextlib.contextmanager
def reproducible(enabled: bool) -> Iterator[None]:
    """Inside the context, torch uses only deterministic kernels, if `enabled`; then its setting is restored."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not enabled:
        yield
        return
    # cuBLAS is deterministic only with a workspace of fixed size, and reads this on first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def placed(
    module: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    without: Iterable[Tensor] = (),
    layout: torch.memory_format | None = None,
) -> Iterator[None]:
    """Inside the context, the floating-point tensors of `module` are on `device` in `dtype`; then they are restored.

    The tensors are replaced by converted copies, and the originals put back bit for bit. A model that is already there
    is not copied, except for fp32 tensors on the CPU whose address is not a multiple of 64, on which the last bits of
    products would depend. Packed weights stay packed: their codes are moved to `device`, and unpacked to `dtype`.

    Args:
        module: the model.
        device: where it runs.
        dtype: of its floating-point tensors; those of modules marked `FULL_PRECISION` are in fp32.
        without: tensors to leave unchanged.
        layout: memory format of convolution kernels; None for that of `memory_format_for`.
    """
    others = {id(tensor) for tensor in without}
    precise = [layer for layer in module.modules() if layer.__dict__.get(FULL_PRECISION)]
    full = {id(one) for layer in precise for one in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
    layout = layout or memory_format_for(module)
    originals: list[tuple[Tensor, Tensor]] = []
    sources: list[tuple[nn.Module, Packed]] = []
    try:
        for layer in module.modules():
            source = weight_source(layer)
            weight = layer._parameters.get("weight")
            if not isinstance(source, Packed) or weight is None or id(weight) in others:
                continue
            moved = source.to(device, dtype, layout)
            for before, after in zip(source.tensors, moved.tensors, strict=True):
                if after is not before:
                    release_pages(before)
            sources.append((layer, source))
            setattr(layer, WEIGHT_SOURCE, moved)
            originals.append((weight, weight.data))
            weight.data = placeholder(weight.shape, device, dtype)
            others.add(id(weight))
        for tensor in [*module.parameters(), *module.buffers()]:
            if id(tensor) in others:
                continue
            target = torch.float32 if id(tensor) in full else dtype
            target = target if tensor.is_floating_point() else tensor.dtype
            wanted = layout if tensor.ndim == 4 else torch.preserve_format
            original = tensor.data
            converted = original.to(device, target, memory_format=wanted)
            if converted.device.type == "cpu" and target == torch.float32 and converted.data_ptr() % _ALIGNMENT:
                converted = converted.clone()
            if converted is not original:
                originals.append((tensor, original))
                tensor.data = converted
                release_pages(original)
        yield
    finally:
        for tensor, original in originals:
            tensor.data = original
        for layer, source in sources:
            setattr(layer, WEIGHT_SOURCE, source)
