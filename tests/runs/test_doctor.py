from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lorasmith.cli.main import app
from lorasmith.core import placement
from lorasmith.core.folders import Folders
from lorasmith.core.kernels import Kernel
from lorasmith.runs import doctor
from lorasmith.runs.doctor import check_up


def test_what_is_here_is_found(tmp_path: Path) -> None:
    found = check_up(Folders(tmp_path))
    assert found.versions["torch"] == torch.__version__ and "missing" not in found.versions.values()
    assert found.devices[-1].name == "cpu" and "fp32" in found.devices[-1].products
    assert found.folders["checkpoints"] == 1, "the built-in model"
    assert 0 < found.free_memory_bytes < found.memory_bytes
    assert all(free > 0 for free in found.disks.values())


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = ["torch>=2", "absent-package>=1"]
    lines += [f"{name}; extra == '{extra}'" for name, extra in (("gguf", "files"), ("nowhere", "files"), ("x", "dev"))]
    monkeypatch.setattr(doctor, "requires", lambda package: lines)
    found = check_up(Folders(tmp_path))
    assert [(one.name, one.present, one.missing) for one in found.extras] == [("files", ("gguf",), ("nowhere",))]
    assert found.versions["absent-package"] == "missing"
    assert found.problems[0].problem == "required packages are missing: absent-package"


def test_the_command_prints_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LITTLE_MEMORY", 0)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 0)
    for arguments in ([], ["--json"]):
        ran = CliRunner().invoke(app, ["doctor", "--base-dir", str(tmp_path), *arguments])
        assert ran.exit_code == 0 and "no models besides" in " ".join(ran.output.split())
    assert json.loads(ran.output)["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(doctor, "LITTLE_DISK", 2**70)
    assert CliRunner().invoke(app, ["doctor", "--base-dir", str(tmp_path)]).exit_code == 1


def test_folders_that_cannot_be_written_have_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.touch()  # a file in its place, as root may write in any folder
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(cache))
    found = check_up(Folders(tmp_path))
    assert not any(Path(folder).is_relative_to(cache) for folder in found.disks)
    (problem,) = [one for one in found.problems if "cannot be written" in one.problem]
    assert problem.problem.startswith(str(cache)) and "LORASMITH_CACHE_DIR" in problem.remedy and problem.is_fault


def test_a_kernel_that_a_gpu_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused = Kernel("doubling", abs, "The Triton kernel for doubling is not used: there is no compiler; install gcc.")
    monkeypatch.setattr(doctor, "triton_kernels", lambda device: [Kernel("halving", abs), refused, refused])
    (problem,) = [one for one in check_up(Folders(tmp_path)).problems if "doubling" in one.problem]
    assert problem.problem.endswith("there is no compiler") and problem.remedy == "install gcc" and not problem.is_fault


def test_each_problem_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_LITTLE_MEMORY", 2**60)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 2**70)
    monkeypatch.setattr(placement, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "\n".join(one.problem for one in check_up(Folders(tmp_path)).problems)
    for words in ("NVIDIA driver", "too little for most models", "are free for", "no models besides"):
        assert words in text
    assert all(one.remedy for one in check_up(Folders(tmp_path)).problems)
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    (tmp_path / "models" / "checkpoints" / "a.safetensors").touch()
    monkeypatch.setattr(doctor, "_LITTLE_MEMORY", 0)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 0)
    monkeypatch.setattr(placement, "which", lambda name: None)
    assert check_up(Folders(tmp_path)).problems == ()
