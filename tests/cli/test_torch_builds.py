"""The build of torch for a machine, from what the tools of machines printed."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorasmith.cli import torch_builds
from lorasmith.cli.main import app
from lorasmith.cli.torch_builds import CUDA_BUILDS, Machine, torch_build

INSTALL = ("python", "-m", "pip", "install")
RULE = "+-----------------------------------------------------------------------------------------+\n"
TITAN_XP_450 = (
    "Wed Jul 29 21:51:11 2020\n"
    + RULE
    + "| NVIDIA-SMI 450.57       Driver Version: 450.57       CUDA Version: 11.0     |\n"
    + "|   0  TITAN Xp            On   | 00000000:17:00.0 Off |                  N/A |\n"
)
RTX_3070_470 = RULE + "| NVIDIA-SMI 470.57.02    Driver Version: 470.57.02    CUDA Version: 11.4     |\n"
OLD_TOOL = RULE + "| NVIDIA-SMI 470.256.02   Driver Version: 580.95.05    CUDA Version: 13.0     |\n"
B200_610 = RULE + "| NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: 13.3     |\n"
KEPLER_418 = RULE + "| NVIDIA-SMI 418.56       Driver Version: 418.56       CUDA Version: 10.1     |\n"
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.124\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n\n"
)

NVIDIA = {
    "NVIDIA GeForce RTX 5090, 580.82.09, 12.0\nNVIDIA GeForce RTX 4090, 580.82.09, 8.9\n": "cu130",
    "NVIDIA B200, 610.43.02, 10.0\n": "cu130",
    "NVIDIA GeForce GTX 1660 Ti, 581.29, 7.5\r\n": "cu130",
    "NVIDIA GeForce RTX 5070, 575.64.03, 12.0\n": "cu128",
    "NVIDIA TITAN V, 570.86.15, 7.0\nNVIDIA RTX 5880 Ada Generation, 570.86.15, 8.9\n": "cu126",
    "NVIDIA TITAN V, 580.82.09, 7.0\nNVIDIA RTX 5880 Ada Generation, 580.82.09, 8.9\n": "cu126",
    "NVIDIA GeForce GTX 1070 Ti, 580.95.05, 6.1\n": "cu126",
    "NVIDIA GeForce RTX 4070, 550.40.07, 8.9\n": "cu126",
    "NVIDIA GeForce GTX 1660 Ti, 536.23, 7.5\r\n": "cu126",
    "NVIDIA GeForce RTX 4090, 525.89.02, 8.9\n": "cu126",
    "NVIDIA GeForce GTX 1650, 515.65.01, 7.5\n": "cpu",
    "NVIDIA GeForce RTX 5090, 580.82.09, 12.0\nNVIDIA GeForce GTX 1080 Ti, 580.82.09, 6.1\n": "cu130",
    "Tesla K80, 550.40.07, 3.7\n": "cpu",
    B200_610: "cu130",
    OLD_TOOL: "cu130",
    RTX_3070_470: "cpu",
    TITAN_XP_450: "cpu",
    KEPLER_418: "cpu",
    MISMATCH: "cpu",
    NO_DRIVER: "cpu",
    "No devices were found\n": "cpu",
    "": "cpu",
}
LAPTOP = """\
01:00.0 3D controller: NVIDIA Corporation GA107M [GeForce RTX 3050 Mobile] (rev a1)
05:00.0 VGA compatible controller: Advanced Micro Devices, Inc. [AMD/ATI] Cezanne (rev c5)
"""
AMD = "VGA compatible controller: Advanced Micro Devices, Inc. [AMD/ATI] "
CARDS = {
    ("Linux", f"03:00.0 {AMD}Navi 31 [Radeon RX 7900 XT/7900 XTX] (rev c8)\n"): "rocm7.2",
    ("Linux", f"08:00.0 {AMD}Navi 21 [Radeon RX 6950 XT] (rev c0)\n"): "rocm7.2",
    ("Linux", f"0a:00.0 {AMD}Ellesmere [Radeon RX 470/480/570/570X/580/580X/590] (rev e7)\n"): "cpu",
    ("Linux", f"0a:00.0 {AMD}Navi 22 [Radeon RX 6700/6700 XT/6750 XT / 6800M/6850M XT] (rev c1)\n"): "cpu",
    ("Linux", LAPTOP): "cpu",  # without NVIDIA's driver
    ("Linux", "29:00.0 VGA compatible controller: Intel Corporation Battlemage G21 [Arc B580]\n"): "xpu",
    ("Linux", "00:02.0 VGA compatible controller: Intel Corporation UHD Graphics 620 (rev 07)\n"): "cpu",
    ("Linux", ""): "cpu",
    ("Windows", "Intel(R) UHD Graphics\r\n"): "cpu",
    ("Windows", "Intel(R) Arc(TM) B580 Graphics\r\n"): "xpu",
    ("Windows", "AMD Radeon(TM) Graphics\r\nAMD Radeon RX 7900 XTX\r\n"): "cpu",
    ("Windows", "Microsoft Remote Display Adapter\r\n"): "cpu",
}


def index_of(machine: Machine) -> str:
    *install, address = torch_build(machine, INSTALL).command
    assert install == [*INSTALL, "torch", "--index-url"]
    return address.removeprefix("https://download.pytorch.org/whl/")


@pytest.mark.parametrize("printed", NVIDIA)
@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_nvidia_cards_get_the_newest_build_of_their_driver(printed: str, system: str) -> None:
    # Integrated graphics beside the card do not count.
    machine = Machine(system=system, processor="x86_64", nvidia=printed, cards="Intel(R) Arc(TM) Graphics\n")
    assert index_of(machine) == NVIDIA[printed]


@pytest.mark.parametrize(("system", "cards"), CARDS)
def test_other_cards(system: str, cards: str) -> None:
    assert index_of(Machine(system=system, processor="AMD64", nvidia=None, cards=cards)) == CARDS[system, cards]


def test_macs() -> None:
    silicon = torch_build(Machine(system="Darwin", processor="arm64", nvidia=None, cards=""), INSTALL)
    assert silicon.command == (*INSTALL, "torch")
    intel = torch_build(Machine(system="Darwin", processor="x86_64", nvidia=None, cards=""), INSTALL)
    assert intel.command == () and "another machine" in intel.because


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("NVIDIA GeForce RTX 4070, 550.40.07, 8.9\n", "update NVIDIA's driver to 580"),
        ("NVIDIA GeForce RTX 4070, 580.40.07, 8.9\n", "NVIDIA GeForce RTX 4070, driver 580"),
        ("RTX 5090, 580.82.09, 12.0\nGTX 1080 Ti, 580.82.09, 6.1\n", "nothing for GTX 1080 Ti"),
        ("Tesla K80, 470.82.01, 3.7\n", "older than those that builds are made for"),
        (KEPLER_418, "for CUDA, update NVIDIA's driver"),
        (NO_DRIVER, "couldn't communicate with the NVIDIA driver"),
        ("", "'nothing'"),
    ],
)
def test_the_reason_and_a_remedy_are_said(printed: str, words: str) -> None:
    build = torch_build(Machine(system="Linux", processor="x86_64", nvidia=printed, cards=""), INSTALL)
    assert words in build.because


def test_the_builds_are_a_choice_without_gaps() -> None:
    for driver in range(450, 700):
        for card in [(5, 0), (6, 1), (7, 0), (7, 5), (8, 6), (9, 0), (10, 0), (12, 0)]:
            fits = any(one.driver <= driver and one.oldest <= card <= one.newest for one in CUDA_BUILDS)
            assert fits == (driver >= 570 or (driver >= 525 and card <= (9, 0)))


def test_the_command_line_prints_it_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(system="Linux", processor="x86_64", nvidia="NVIDIA L4, 580.82.09, 8.9\n", cards="")
    monkeypatch.setattr(torch_builds, "this_machine", lambda: machine)
    done = CliRunner().invoke(app, ["doctor", "--install"])
    note, command = done.output.splitlines()
    assert "torch for CUDA 13.0: NVIDIA L4, driver 580" in note
    assert command == torch_builds.command_line(torch_build(machine, torch_builds.installer()).command)
    document = json.loads(CliRunner().invoke(app, ["doctor", "--install", "--json"]).stdout)
    assert document["command"][-1].endswith("/cu130")
    intel = Machine(system="Darwin", processor="x86_64", nvidia=None, cards="")
    monkeypatch.setattr(torch_builds, "this_machine", lambda: intel)
    assert CliRunner().invoke(app, ["doctor", "--install"]).exit_code == 1
    alone = "import sys; sys.modules['torch'] = None; from lorasmith.cli.main import app; app(['doctor', '--install'])"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True)
    assert "pip install" in done.stdout


def test_an_environment_of_uv_has_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_builds.importlib.util, "find_spec", lambda name: name)
    assert torch_builds.installer()[:3] == (sys.executable, "-m", "pip")
    monkeypatch.setattr(torch_builds.importlib.util, "find_spec", lambda name: None)
    assert torch_builds.installer()[:2] == ("uv", "pip") and sys.executable in torch_builds.installer()


def test_the_file_runs_before_anything_is_installed() -> None:
    file = Path(torch_builds.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", str(file)], capture_output=True, text=True, check=True)
    title, command = done.stdout.splitlines()
    assert title.startswith("torch for ") and " install " in command


def test_make_saves_the_download_of_cuda_where_there_is_no_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server of this machine stands for PyTorch's."""
    (tmp_path / "cpu" / "torch").mkdir(parents=True)
    served = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    index = http.server.ThreadingHTTPServer(("127.0.0.1", 0), served)
    threading.Thread(target=index.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{index.server_port}/"
    monkeypatch.setattr(torch_builds, "_INDEX", address)
    found = {"pip": True}
    monkeypatch.setattr(torch_builds.importlib.util, "find_spec", found.get)
    bare = Machine(system="Linux", processor="x86_64", nvidia=None, cards="")
    build = torch_builds.smaller_build(bare)
    assert build is not None and build.command[-3:] == ("torch", "--index-url", f"{address}cpu")
    for other in (
        replace(bare, nvidia=MISMATCH),  # a card whose driver is to be repaired
        replace(bare, cards="VGA compatible controller: Advanced Micro Devices, Inc. [AMD/ATI] Radeon RX 7900 XTX"),
        replace(bare, system="Darwin", processor="arm64"),
    ):
        assert torch_builds.smaller_build(other) is None
    found["torch"] = True
    assert torch_builds.smaller_build(bare) is None
    del found["torch"]
    assert torch_builds.smaller_build(bare) == build
    index.shutdown()
    index.server_close()
    assert torch_builds.smaller_build(bare) is None


def test_make_goes_on_where_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    build = torch_builds.TorchBuild(title="the CPU", because="no card", command=("pip", "install", "torch"))
    monkeypatch.setattr(torch_builds, "smaller_build", lambda machine: build)
    monkeypatch.setattr(torch_builds.subprocess, "run", lambda command, **_: ran.append(command))
    monkeypatch.setattr(torch_builds, "this_machine", lambda: None)
    monkeypatch.setattr(sys, "argv", ["torch_builds.py", "--save-download"])
    torch_builds.main()
    assert ran == [build.command]
    monkeypatch.setattr(torch_builds, "smaller_build", lambda machine: None)
    torch_builds.main()
    assert len(ran) == 1


def test_a_build_that_cannot_be_installed_names_the_other_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess((), 1)
    monkeypatch.setattr(torch_builds.subprocess, "run", lambda command, **_: failed)
    monkeypatch.setattr(
        torch_builds,
        "this_machine",
        lambda: torch_builds.Machine(system="Linux", processor="x86_64", nvidia=None, cards=""),
    )
    monkeypatch.setattr(sys, "argv", ["torch_builds.py", "--run"])
    with pytest.raises(SystemExit, match="1"):
        torch_builds.main()
    assert "Without this command, pip installs PyPI's build" in capsys.readouterr().err
