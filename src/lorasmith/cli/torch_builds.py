"""Which build of torch fits a machine, by what its driver prints, and the command that installs it.

`lorasmith doctor --install` prints it. Only Python is needed, so that it also runs before anything is installed:

    python src/lorasmith/cli/torch_builds.py --run

`make` runs it with `--save-download`, before everything else is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import shlex
import subprocess
import sys
import urllib.request
from dataclasses import dataclass

_INDEX = "https://download.pytorch.org/whl/"


@dataclass(frozen=True, kw_only=True)
class CudaBuild:
    """An index of CUDA builds, and what they run on."""

    index: str
    title: str
    driver: int  # oldest series of NVIDIA's driver, the same on Linux and Windows
    oldest: tuple[int, int]  # compute capability of the oldest card with kernels
    newest: tuple[int, int]  # of the newest


CUDA_BUILDS = (
    CudaBuild(index="cu130", title="CUDA 13.0", driver=580, oldest=(7, 5), newest=(99, 0)),  # from torch 2.9 on
    CudaBuild(index="cu126", title="CUDA 12.6", driver=525, oldest=(5, 0), newest=(9, 0)),  # up to torch 2.14
    CudaBuild(index="cu128", title="CUDA 12.8", driver=570, oldest=(7, 5), newest=(12, 0)),  # up to torch 2.11
)
"""The first that fits is taken. Drivers: NVIDIA's table of minor version compatibility
(docs.nvidia.com/deploy/cuda-compatibility), which starts CUDA 12 at 525 and 13 at 580; 570 is the first that
knows Blackwell. Cards: PyTorch's CUDA support matrix (RELEASE.md of pytorch/pytorch), by release.
"""

ROCM = "rocm7.2"  # torch 2.11 to 2.13
_ROCM_CARDS = r"Radeon (?:RX (?:6[89]|7\d|9\d)\d\d|PRO W[67]\d00|AI PRO)|Instinct MI[1-9]\d\d"
_XPU_CARDS = r"\bArc\b"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine's own tools print about it."""

    system: str  # of `platform.system`
    processor: str  # of `platform.machine`
    nvidia: str | None  # of nvidia-smi, with what it prints as an error; None where there is none
    cards: str  # a line for each graphics card: of lspci on Linux, names of adapters on Windows


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """The build for a machine: `command` installs it, and is empty where there is none."""

    title: str
    because: str  # what of the machine decided, and what would give a better build
    command: tuple[str, ...]


def torch_build(machine: Machine, install: tuple[str, ...]) -> TorchBuild:
    """The build of torch for a machine, and the command that installs it, which begins with `install`."""
    if machine.system == "Darwin":
        if machine.processor != "arm64":
            return TorchBuild(
                title="none",
                because="since 2.3 there are none for Macs with Intel processors; use another machine",
                command=(),
            )
        return _build("macOS", None, "Apple silicon", install)
    if machine.nvidia is not None:
        return _for_nvidia(machine.nvidia, install)
    lines = [line for line in machine.cards.splitlines() if re.search(r"(?:AMD|ATI)\b", line)]
    of_amd = (re.search(f"({_ROCM_CARDS})", line) for line in lines)
    if amd := next(filter(None, of_amd), None):
        if machine.system == "Linux":
            return _build("ROCm 7.2", ROCM, amd[1], install)
        return _build("the CPU", "cpu", f"{amd[1]}; on Linux there are builds for it, with ROCm", install)
    if re.search(_XPU_CARDS, machine.cards):
        return _build("XPU", "xpu", "Intel Arc graphics", install)
    return _build("the CPU", "cpu", "no graphics card was found for which there is a build", install)


def _for_nvidia(printed: str, install: tuple[str, ...]) -> TorchBuild:
    gpus = re.findall(r"^(.+), (\d+)\.[\d.]+, (\d+)\.(\d+)\s*$", printed, re.MULTILINE)
    banner = re.search(r"(?:Driver|KMD) Version: *(\d+)\.", printed)
    if not gpus and banner is None:
        first = next((line.strip() for line in printed.splitlines() if line.strip()), "nothing")
        return _build("the CPU", "cpu", f"nvidia-smi prints {first!r}; repair NVIDIA's driver", install)
    driver = int(gpus[0][1]) if gpus else int(banner[1]) if banner else 0
    cards = {(int(major), int(minor)): name for name, _, major, minor in gpus}
    newest = max(cards, default=_UNKNOWN)
    because = f"{cards.get(newest, 'an NVIDIA card')}, driver {driver}"
    update = f"update NVIDIA's driver to {CUDA_BUILDS[0].driver} or later"
    fitting = [
        cuda_build
        for cuda_build in CUDA_BUILDS
        if driver >= cuda_build.driver and cuda_build.oldest <= newest <= cuda_build.newest
    ]
    if newest < min(cuda_build.oldest for cuda_build in CUDA_BUILDS):
        return _build("the CPU", "cpu", f"{because}; it is older than those that builds are made for", install)
    if not fitting:
        return _build("the CPU", "cpu", f"{because}; for CUDA, {update}", install)
    # For cards of several generations a build for all of them, or else one for the newest.
    build = next((candidate for candidate in fitting if candidate.oldest <= min(cards, default=newest)), fitting[0])
    left_out = [name for card, name in cards.items() if card < build.oldest]
    if left_out:
        because += f"; the build has nothing for {', '.join(left_out)}"
    elif driver < CUDA_BUILDS[0].driver and newest >= CUDA_BUILDS[0].oldest:
        because += f"; for the newest torch, {update}"
    return _build(build.title, build.index, because, install)


_UNKNOWN = (7, 5)  # of cards whose capability nvidia-smi does not print, as drivers before 510: every build has it


def _build(title: str, index: str | None, because: str, install: tuple[str, ...]) -> TorchBuild:
    where = () if index is None else ("--index-url", _INDEX + index)
    return TorchBuild(title=title, because=because, command=(*install, "torch", *where))


def smaller_build(machine: Machine) -> TorchBuild | None:
    """The build for the CPU, where pip would choose the one for NVIDIA cards for a machine without a graphics card.

    None if torch is installed, if a card's tools are there, or if the index of these builds does not answer at once.
    """
    if machine.system != "Linux" or machine.nvidia is not None or importlib.util.find_spec("torch") is not None:
        return None
    build = torch_build(machine, installer())
    if build.command[-1] != f"{_INDEX}cpu":
        return None
    try:
        urllib.request.urlopen(f"{_INDEX}cpu/torch/", timeout=_PATIENCE_S).close()
    except OSError:
        return None
    return build


_PATIENCE_S = 2


def installer() -> tuple[str, ...]:
    """The command that installs packages for this interpreter, whose environment has no pip if uv made it.

    It replaces an installed torch, which satisfies `torch` whatever it was built for.
    """
    if importlib.util.find_spec("pip") is None:
        return ("uv", "pip", "install", "--python", sys.executable, "--reinstall")
    return (sys.executable, "-m", "pip", "install", "--force-reinstall")


def this_machine() -> Machine:
    """Ask the tools of this machine."""
    nvidia = _printed("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
    if nvidia is not None and "not a valid field" in nvidia:
        nvidia = _printed("nvidia-smi")
    names = "(Get-CimInstance Win32_VideoController).Name"
    asked = {"Linux": ("lspci",), "Windows": ("powershell", "-NoProfile", "-Command", names)}.get(platform.system())
    cards = _printed(*asked) if asked else None
    return Machine(system=platform.system(), processor=platform.machine(), nvidia=nvidia, cards=cards or "")


def _printed(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except OSError:
        return None
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer in a minute"
    return done.stdout


def command_line(command: tuple[str, ...]) -> str:
    """A command as this system's shell takes it."""
    if platform.system() == "Windows":
        return subprocess.list2cmdline(command)
    return shlex.join(command)


def main() -> None:
    """Print the command, and run it with `--run`."""
    parser = argparse.ArgumentParser(description="The build of torch for this machine.")
    parser.add_argument("--run", action="store_true", help="also run the command")
    parser.add_argument(
        "--save-download",
        action="store_true",
        help="install the build for the CPU if there is no graphics card and no torch yet, and else nothing",
    )
    arguments = parser.parse_args()
    if arguments.save_download:
        if smaller := smaller_build(this_machine()):
            sys.stdout.write(f"torch for {smaller.title}: {smaller.because}\n")
            sys.stdout.flush()
            subprocess.run(smaller.command, check=False)  # if it fails, what is installed next brings torch
        return
    build = torch_build(this_machine(), installer())
    sys.stdout.write(f"torch for {build.title}: {build.because}\n{command_line(build.command)}\n")
    sys.stdout.flush()
    if not build.command:
        sys.exit(1)
    if arguments.run and (code := subprocess.run(build.command, check=False).returncode):
        sys.stderr.write("This build was not installed. Without this command, pip installs PyPI's build of torch.\n")
        sys.exit(code)


if __name__ == "__main__":
    main()
