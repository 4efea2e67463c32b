"""Devices and dtypes, their names, and placing a model on them inside a context."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from shutil import which
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lorasmith.core.allocator import release_freed_memory
from lorasmith.core.errors import OptionError
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.pinned_memory import DeviceCopies
from lorasmith.core.printable import memory_text
from lorasmith.core.processes import current
from lorasmith.core.quantization import WEIGHT_SOURCE, Packed, placeholder, weight_source

FULL_PRECISION = "full_precision"
"""Attribute of a module: if True, its own parameters and buffers are in fp32 whatever the dtype of the others."""


_ALIGNMENT = 64
"""Bytes by which torch aligns allocations; tensors on memory-mapped files start where the file's header ends."""


def full_precision(module: nn.Module) -> set[Tensor]:
    """The tensors that are placed in fp32 whatever the dtype of the others.

    They are those of modules with the mark, and non-persistent buffers: constants such as rotary frequencies, which
    published implementations compute in fp32.
    """
    found: set[Tensor] = set()
    for layer in module.modules():
        if layer.__dict__.get(FULL_PRECISION):
            found |= {*layer.parameters(recurse=False), *layer.buffers(recurse=False)}
        found |= {buffer for name in layer._non_persistent_buffers_set if (buffer := layer._buffers[name]) is not None}
    return {tensor for tensor in found if tensor.is_floating_point()}


def best_device() -> torch.device:
    """The first CUDA device, or the CPU; with several processes on a machine, each has its own CUDA device."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda") if current().size == 1 else torch.device("cuda", current().gpu)


@functools.cache
def side_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """The stream of a GPU beside the current one for a use, which is one for the whole process.

    torch's allocator keeps freed memory for the stream that it was allocated on, and cuBLAS keeps a workspace for each.
    """
    return torch.cuda.Stream(device)


def memory_used(device: torch.device) -> int:
    """Bytes that this process has: allocated on a GPU, at the peak since `reset_peak_memory_stats`, or resident on the
    CPU; 0 if the system does not say.
    """
    if device.type == "cuda":
        # `max_memory_allocated` flattens and sorts all statistics, which takes a third of a millisecond.
        known = torch.cuda.memory_stats_as_nested_dict(device)
        return int(known["allocated_bytes"]["all"]["peak"]) if known else 0
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - in every step
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def free_memory(device: torch.device, limit_bytes: int | None = None) -> int:
    """Free memory in bytes of a CUDA device or the CPU; `limit_bytes` limits what the whole process may use."""
    if device.type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken
    else:
        taken = psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available
    return int(free if limit_bytes is None else min(free, limit_bytes - taken))


def memory_beside(device: torch.device) -> str:
    """The memory of a GPU and what of it other programs have, as a clause."""
    free, total = torch.cuda.mem_get_info(device)
    others = max(total - free - torch.cuda.memory_reserved(device), 0)
    return f"other programs have {memory_text(others)} of its {memory_text(total)}"


def free_device_memory() -> None:
    """Free what nobody refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where no GPU is used


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter."""
    return next(module.parameters()).device


def drives_display(index: int = 0) -> bool:
    """Whether nvidia-smi says that a card of torch's drives a display; False where it does not run."""
    # It counts all cards, in the order of their slots; torch counts those that it may use, the fastest first.
    name = f"GPU-{torch.cuda.get_device_properties(index).uuid}" if torch.cuda.is_available() else str(index)
    command = ("nvidia-smi", f"--id={name}", "--query-gpu=display_active", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == "Enabled"


def chosen_device(name: str | torch.device | None) -> torch.device:
    """A device by its name, such as `cuda:1`; None for `best_device`.

    Raises OptionError if it does not exist here, or is a GPU for which this torch has no kernels.
    """
    try:
        device = best_device() if name is None else torch.device(name)
        if name is not None:
            torch.empty(1, device=device)
        assert device.type != "meta"  # has no numbers
    except (RuntimeError, AssertionError) as error:  # torch raises the second where it was built without CUDA
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        why, remedy = "", "name one of these"
        if idle_gpu():
            why, remedy = f", as {idle_gpu()}", f"{remedy}, or see what lorasmith doctor --install prints"
        raise OptionError(f"device must be one that is here ({there}){why}, got {str(name)!r}; {remedy}") from error
    if device.type == "cuda":
        _check_kernels(device)
    return device


def idle_gpu() -> str:
    """Why no CUDA device is here although NVIDIA's driver is, as a clause; empty if one is, or without a driver."""
    if torch.cuda.is_available() or which("nvidia-smi") is None:
        return ""
    return f"there is an NVIDIA driver, but this torch ({torch.__version__}) cannot use it"


def _check_kernels(device: torch.device) -> None:
    """Raise OptionError if torch was built without kernels for a GPU, which fails at its first one otherwise."""
    if torch.version.hip is not None or not (built := torch.cuda.get_arch_list()):
        return
    major, minor = torch.cuda.get_device_capability(device)
    # Machine code runs on cards of its generation from its number on, and PTX (compute) is compiled for all later ones.
    numbers = [(kind, int(match[1]), int(match[2])) for kind, match in _kernel_kinds(built)]
    if any(of == major and least <= minor for kind, of, least in numbers if kind == "sm"):
        return
    if any((of, least) <= (major, minor) for kind, of, least in numbers if kind == "compute"):
        return
    known = ", ".join(dict.fromkeys(f"{of}.{least}" for _, of, least in numbers))
    raise OptionError(
        f"device must be a GPU for which torch {torch.__version__} has kernels (compute capability {known}), got "
        f"{torch.cuda.get_device_name(device)} with {major}.{minor}; install another build of torch, whose command "
        "lorasmith doctor --install prints, or use device cpu"
    )


def _kernel_kinds(built: Sequence[str]) -> Iterator[tuple[str, re.Match[str]]]:
    for architecture in built:
        kind, _, number = architecture.partition("_")
        if (match := re.match(r"(\d+)(\d)", number)) is not None:
            yield kind, match


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device multiplies natively in a dtype; otherwise it emulates, which takes 3 to 100 times as long."""
    if dtype not in _FEATURES or device.type not in ("cpu", "cuda"):  # of others torch does not say
        return True
    features, capability, oldest = _FEATURES[dtype]
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= capability
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    if not any(name in allowed.upper() for name in (*oldest, "AMX", "AVX10", "ALL", "DEFAULT")):
        return False
    capabilities: Mapping[str, Any] = (
        torch.cpu.get_capabilities()
        if hasattr(torch.cpu, "get_capabilities")  # since torch 2.9
        else {"avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()}
    )
    return any(capabilities.get(name) for name in features)


_FEATURES: dict[torch.dtype, tuple[tuple[str, ...], tuple[int, int], tuple[str, ...]]] = {
    torch.bfloat16: (("avx512_bf16", "amx_bf16", "bf16"), (8, 0), ("BF16", "FP16")),
    torch.float16: (("avx512_fp16", "amx_fp16", "fp16_arith"), (7, 0), ("FP16",)),
}
"""For dtypes that not all devices multiply in: CPU features by torch's names, the least compute capability of NVIDIA
GPUs, and names of such CPUs in oneDNN's ISA limit.
"""


def fp32_products() -> str:
    """How products of fp32 matrices are computed on a GPU, as torch names it: `highest` is fp32, `high` TF32.

    Environments may choose it (`TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`, as NVIDIA's images do, and `NVIDIA_TF32_OVERRIDE`).
    """
    if _never_tf32():
        return "highest"
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody in this process used the names of torch 2.9, after which the earlier ones raise
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def has_tf32_convolutions() -> bool:
    """Whether convolutions in fp32 are TF32's on a GPU that has it."""
    if _never_tf32():
        return False
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[no-any-return,attr-defined]


def _never_tf32() -> bool:
    """NVIDIA's libraries read this once, and then heed no setting of torch's."""
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or fp32 where the device would emulate products in it."""
    return dtype if multiplies(dtype, device) else torch.float32


def sent(
    tensor: Tensor, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """A tensor of the CPU on `device` in `dtype`; from pinned memory to a GPU, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.to(dtype).pin_memory()  # a conversion during the copy goes through pageable memory
    return tensor.to(device, dtype, memory_format=memory_format, non_blocking=True)


def memory_format_for(module: nn.Module) -> torch.memory_format:
    """Channels-last for models with 2-D convolutions larger than 1×1, which is faster."""
    convolutional = any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in module.modules())
    return torch.channels_last if convolutional else torch.contiguous_format


@contextlib.contextmanager
def reproducible(enabled: bool, device: torch.device) -> Iterator[None]:
    """Inside the context, torch uses only deterministic kernels, if `enabled`. Raises OptionError if it cannot."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not enabled:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        if device.type == "cuda":
            _check_cublas(device)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _check_cublas(device: torch.device) -> None:
    """Raise OptionError if torch's first product in this process did not see a workspace of fixed size."""
    try:
        torch.mm(*torch.ones(2, 16, 16, device=device))
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        raise OptionError(
            "deterministic needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before the first product on a GPU, "
            "but this program made one before it imported lorasmith; set the variable, or import lorasmith first"
        ) from error


_LARGE_BYTES = 2**28  # of copied tensors from which their memory is returned to the system


@contextlib.contextmanager
def placed(
    module: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    without: Iterable[Tensor] = (),
    layout: torch.memory_format | None = None,
) -> Iterator[None]:
    """Inside the context, the floating-point tensors of `module` are on `device` in `dtype`.

    Tensors are replaced by converted copies, and the originals restored bit for bit; those in `without` are left alone,
    and those of `full_precision` are in fp32. A tensor already there is not copied, except in fp32 on the CPU at an
    address that is not a multiple of 64, on which the last bits of products would depend. Packed weights stay packed:
    their codes are moved to `device`, and unpack to `dtype`. `layout` is the memory format of convolution kernels; None
    for that of `memory_format_for`.
    """
    others = {id(tensor) for tensor in without}
    full = {id(tensor) for tensor in full_precision(module)}
    layout = layout or memory_format_for(module)
    originals: list[tuple[Tensor, Tensor]] = []
    sources: list[tuple[nn.Module, Packed]] = []
    try:
        with contextlib.closing(DeviceCopies(device)) as copies:
            for layer in module.modules():
                source = weight_source(layer)
                weight = layer._parameters.get("weight")
                if not isinstance(source, Packed) or weight is None or id(weight) in others:
                    continue
                sources.append((layer, source))
                setattr(layer, WEIGHT_SOURCE, source.copied(copies, dtype, layout))
                originals.append((weight, weight.data))
                weight.data = placeholder(weight.shape, device, dtype)
                others.add(id(weight))
            for tensor in [*module.parameters(), *module.buffers()]:
                if id(tensor) in others:
                    continue
                target = torch.float32 if id(tensor) in full else dtype
                target = target if tensor.is_floating_point() else tensor.dtype
                original = tensor.data
                converted = copies.to(original, target, layout if tensor.ndim == 4 else torch.preserve_format)
                if converted.device.type == "cpu" and target == torch.float32 and converted.data_ptr() % _ALIGNMENT:
                    converted = converted.clone()
                    release_pages(original)
                if converted is not original:
                    originals.append((tensor, original))
                    tensor.data = converted
        yield
    finally:
        copied_bytes = sum(tensor.nbytes for tensor, _ in originals)
        for tensor, original in originals:
            tensor.data = original
        for layer, source in sources:
            setattr(layer, WEIGHT_SOURCE, source)
        if device.type == "cpu" and copied_bytes > _LARGE_BYTES:
            release_freed_memory()


_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SPELLINGS = {**_NAMES, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_from_name(name: str) -> torch.dtype:
    """`bf16` → `torch.bfloat16`. Raises OptionError for anything but fp32, bf16 and fp16 (or the long names)."""
    try:
        return _SPELLINGS[name.casefold()]
    except KeyError:
        raise OptionError(f"a dtype is one of {', '.join(_NAMES)}, got {name!r}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `bf16`."""
    return next((name for name, known in _NAMES.items() if known == dtype), str(dtype).removeprefix("torch."))


def chosen_dtype(name: str, module: nn.Module) -> torch.dtype:
    """The dtype that a setting selects for a model, `none` being that of its first parameter. Raises OptionError."""
    return next(module.parameters()).dtype if name == "none" else dtype_from_name(name)
