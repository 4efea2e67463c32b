from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.runs.sweep_file import Sweep
from lorasmith.runs.sweep_launch import slurm_script, submit_to_slurm
from lorasmith.runs.sweep_run import sweep_folder
from tests.runs.sweep_cases import sweep_of

posix = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts stand in for programs")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return sweep_of(tmp_path)


def program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_without_sbatch_slurm_is_refused(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OptionError, match="needs the program sbatch, which is not on PATH; run this on a login node"):
        submit_to_slurm([1], tmp_path, ["lorasmith"], [])
    assert not (tmp_path / "sweep.sbatch").exists()


def test_the_script_is_an_array_of_the_runs_left() -> None:
    script = slurm_script([7, 1, 2, 3, 9, 10], "my sweep", ["python", "-m", "lorasmith", "sweep", "a b.toml"])
    assert "#SBATCH --array=1-3,7,9-10\n" in script
    assert "#SBATCH --job-name=my_sweep\n" in script
    assert script.startswith("#!/bin/bash\n")
    assert script.endswith("exec python -m lorasmith sweep 'a b.toml' --only \"$SLURM_ARRAY_TASK_ID\"\n")


@posix
def test_the_array_is_submitted_with_the_options(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "sbatch", f'printf "%s\\n" "$@" > {tmp_path}/given; echo "4242;cluster"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    output = sweep_folder(tmp_path / "out")
    job, script = submit_to_slurm([2, 3], output, ["lorasmith", "sweep"], ["--gpus=1", "--comment=a b"])
    assert (job, script) == ("4242", output / "sweep.sbatch")
    assert (tmp_path / "given").read_text().splitlines() == [
        "--parsable",
        f"--output={output}/logs/slurm-%A_%a.txt",
        "--gpus=1",
        "--comment=a b",
        str(script),
    ]
    assert "--array=2-3\n" in script.read_text()


@posix
@pytest.mark.parametrize("name", ['out"\ntouch ran\n#', "out\nx", "it's", "a\x1b[2J", "a\u2028b"])
def test_names_with_control_characters_and_quotes_leave_for_no_other_program(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    program(tmp_path / "bin", "sbatch", f"touch {tmp_path}/called")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    with pytest.raises(OptionError, match="must have no control characters, and the output no quotes"):
        submit_to_slurm([1], tmp_path / name, ["lorasmith"], [])
    if name != "it's":  # a shell's quotes hold those of others
        with pytest.raises(OptionError, match="must have no control characters"):
            submit_to_slurm([1], tmp_path / "out", ["lorasmith", "sweep", name], [])
    assert {one.name for one in tmp_path.iterdir()} == {"bin", "sweep.toml"}


@posix
def test_what_sbatch_refuses_is_said(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    with pytest.raises(TrainingError, match="it said: sbatch: error: invalid partition; give what it needs with"):
        submit_to_slurm([1], sweep_folder(tmp_path / "out"), ["lorasmith"], [])
