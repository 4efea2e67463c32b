"""What this machine and this installation can do, and remedies for what they cannot."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch

from lorasmith.core.errors import OutputError
from lorasmith.core.extras import EDITOR, TINY
from lorasmith.core.files import check_writable
from lorasmith.core.folders import MODEL_EXTENSIONS, Folders
from lorasmith.core.placement import dtype_name, idle_gpu, multiplies
from lorasmith.core.printable import memory_text
from lorasmith.core.processor import processor_name, usable_processors
from lorasmith.data.encoding_cache import default_cache
from lorasmith.families.locating import built_in_models
from lorasmith.runs.extending import InstalledExtension, installed_extensions
from lorasmith.training.memory.compilation import compiler, triton_kernels
from lorasmith.training.processor_way import Load
from lorasmith.training.storage.run_states import free_bytes

_PACKAGE = "lorasmith"
LITTLE_DISK, _LITTLE_MEMORY = 5 * 2**30, 6 * 2**30
_KINDS = ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras")
_COMPANIONS = (TINY, EDITOR)
_PRODUCTS = (torch.float32, torch.bfloat16, torch.float16)


_OTHER_OUTPUT = "check its permissions, or start runs in another folder"
_OTHER_BASE = "check its permissions, or name another folder with --base-dir"
_OTHER_CACHE = (
    "check its permissions, or name another folder in LORASMITH_CACHE_DIR: each run encodes its images again until then"
)


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """A device to train on."""

    name: str  # as `--device` takes it
    title: str  # of the hardware
    memory_bytes: int
    products: tuple[str, ...]  # formats in which it multiplies matrices without emulation
    compiler: str  # of `--compile`; `none` without one


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An optional dependency group, the NAME of `pip install "lorasmith[NAME]"`, and its packages."""

    name: str
    present: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def remedy(self) -> str:
        """What installs those that are missing."""
        companion = next((companion for companion in _COMPANIONS if companion.name in self.missing), None)
        return f'run pip install "lorasmith[{self.name}]"' if companion is None else companion.remedy


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem of this machine, this installation or the base folder, and its remedy, in words."""

    problem: str
    remedy: str
    is_fault: bool = True  # wrong with machine or installation, not only with the folder


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """The result of `check_up`."""

    versions: dict[str, str]  # of Python and packages; `missing` for a required package that is not installed
    devices: tuple[DeviceFacts, ...]  # the default one first
    memory_bytes: int  # of the machine
    free_memory_bytes: int
    threads: int  # of computations on the CPU, beside what other programs do now
    busy: float  # processors that other programs keep busy
    base_dir: str
    folders: dict[str, int]  # number of model files by kind of folder, included folders counted
    cache: str  # folder of cached encodings
    disks: dict[str, int]  # free bytes, by folder that runs write to
    extras: tuple[Extra, ...]
    extensions: tuple[InstalledExtension, ...]  # things that other packages bring
    problems: tuple[Problem, ...]


def check_up(folders: Folders) -> Checkup:
    """Check versions, devices, memory, disks, model folders and optional packages."""
    required, extras = _packages()
    versions = {"python": platform.python_version(), _PACKAGE: _version(_PACKAGE)}
    versions |= {name: _version(name) for name in (*required, *(name for extra in extras for name in extra.present))}
    versions["torch"] = torch.__version__  # names the build (+cpu, +cu132), which the package's own version may not
    devices = tuple(_devices())
    cache = default_cache().folder
    written = {Path.cwd(): _OTHER_OUTPUT, folders.output: _OTHER_BASE, cache: _OTHER_CACHE}
    refused = {path: remedy for path, remedy in written.items() if not _is_writable(path)}
    disks = {str(path): free_bytes(path) for path in written if path not in refused}
    memory, load = psutil.virtual_memory(), Load.now(always=True)
    counts = {kind: len(folders.files(kind, MODEL_EXTENSIONS)) for kind in _KINDS}
    extensions = tuple(installed_extensions())
    return Checkup(
        versions=versions,
        devices=devices,
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        threads=load.chosen,
        busy=load.busy,
        base_dir=str(folders.base),
        folders=counts,
        cache=str(cache),
        disks=disks,
        extras=extras,
        extensions=extensions,
        problems=(
            *_problems(versions, extensions, devices, memory.total, load),
            *_folder_problems(refused, disks, counts, folders.base),
        ),
    )


def _packages() -> tuple[list[str], tuple[Extra, ...]]:
    """Required packages, and the extras without the developers'; from the metadata of the installation."""
    required: list[str] = []
    optional: dict[str, list[str]] = {}
    for require in requires(_PACKAGE) or []:
        name = re.match(r"[A-Za-z0-9._-]+", require)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", require)
        if name is None:
            continue
        if extra is None:
            required.append(name[0])
        elif extra[1] != "dev":
            optional.setdefault(extra[1], []).append(name[0])
    extras = []
    for group, names in optional.items():
        there = [name for name in names if _version(name) != "missing"]
        missing = tuple(name for name in names if name not in there)
        extras.append(Extra(name=group, present=tuple(there), missing=missing))
    return required, tuple(extras)


def _version(package: str) -> str:
    if package in (companions := {companion.name: companion.version for companion in _COMPANIONS}):
        return companions[package] or "missing"
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _devices() -> list[DeviceFacts]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        about = torch.cuda.get_device_properties(device)
        found.append(_device(device, str(about.name), int(about.total_memory)))
    found.append(_device(torch.device("cpu"), _processor(), psutil.virtual_memory().total))
    return found


def _device(device: torch.device, title: str, memory_bytes: int) -> DeviceFacts:
    products = [dtype_name(dtype) for dtype in _PRODUCTS if _multiplies(device, dtype)]
    return DeviceFacts(
        name=str(device), title=title, memory_bytes=memory_bytes, products=tuple(products), compiler=compiler(device)
    )


def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products in a format work and are not emulated."""
    if not multiplies(dtype, device):
        return False
    with contextlib.suppress(RuntimeError):
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        return bool((ones @ ones).float().eq(8).all())
    return False


def _processor() -> str:
    cores = usable_processors()
    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores"


def _is_writable(folder: Path) -> bool:
    try:
        check_writable(folder)
    except OutputError:
        return False
    return True


def _problems(
    versions: Mapping[str, str],
    extensions: Sequence[InstalledExtension],
    devices: Sequence[DeviceFacts],
    memory_bytes: int,
    load: Load,
) -> Iterator[Problem]:
    """What is wrong with the installation and the machine, or slows it down."""
    if missing := [name for name, installed in versions.items() if installed == "missing"]:
        yield Problem(problem=f"required packages are missing: {', '.join(missing)}", remedy="install lorasmith again")
    for fault in (extension.fault for extension in extensions if extension.fault):
        problem, _, remedy = fault.rpartition("; ")
        yield Problem(problem=problem, remedy=remedy)
    for companion in _COMPANIONS:
        if companion.version and companion.problem:
            yield Problem(problem=companion.problem, remedy=companion.remedy)
    if why := idle_gpu():
        yield Problem(
            problem=why,
            remedy="install the build of torch for it: lorasmith doctor --install prints the command",
        )
    kernels = (kernel for device in devices for kernel in triton_kernels(torch.device(device.name)))
    for refusal in filter(None, dict.fromkeys(kernel.refusal for kernel in kernels)):
        problem, _, remedy = refusal.rstrip(".").rpartition("; ")
        yield Problem(problem=problem, remedy=remedy, is_fault=False)
    if memory_bytes < _LITTLE_MEMORY:
        yield Problem(
            problem=f"the machine has {memory_text(memory_bytes)} of memory, too little for most models",
            remedy="see lorasmith plan for settings that need less",
        )
    if load.note:
        problem, _, remedy = load.note.partition("; ")
        yield Problem(problem=problem, remedy=remedy, is_fault=False)


def _folder_problems(
    refused: Mapping[Path, str], disks: Mapping[str, int], counts: Mapping[str, int], base: Path
) -> Iterator[Problem]:
    """Folders that cannot be written, full disks, and a base folder without models."""
    yield from (Problem(problem=f"{path} cannot be written", remedy=remedy) for path, remedy in refused.items())
    for folder, free in disks.items():
        if free < LITTLE_DISK:
            remedy = "free some space, or use another folder"
            yield Problem(problem=f"{memory_text(free)} are free for {folder}", remedy=remedy)
    if counts["checkpoints"] + counts["diffusion_models"] <= len(built_in_models()):
        yield Problem(
            problem=f"{base} has no models{' besides the built-in one' * len(built_in_models())}",
            remedy="name your ComfyUI folder with --base-dir, or give model files with --model",
            is_fault=False,
        )
