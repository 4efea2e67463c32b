from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.runs import sweep_launch, sweep_run
from lorasmith.runs.sweep_file import Sweep
from lorasmith.runs.sweep_launch import run_on_ray, run_one, slurm_script, submit_to_slurm
from lorasmith.runs.sweep_run import sweep_folder
from tests.runs.sweep_cases import names_of, sweep_of
from tests.runs.test_sweep_run import WORKER, Told

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


def test_one_run_is_run_to_its_end(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_run, "WORKER_COMMAND", WORKER)
    monkeypatch.chdir(tmp_path)
    first, second, *_ = names_of(sweep)
    (tmp_path / "acts.json").write_text(json.dumps({first: "fail"}))
    output = sweep_folder(tmp_path / "out")
    assert run_one(sweep, first, output, {}) == "there is no usable image"
    assert run_one(sweep, second, output, {}) == ""


class RayError(Exception):
    pass


class TaskCancelledError(RayError):
    pass


class Reference:
    def __init__(self, function: Any, given: tuple[Any, ...]) -> None:
        self.function, self.given = function, given


class FakeRay(ModuleType):
    """As much of Ray as is called: tasks run when somebody waits for them."""

    def __init__(self, gpus: int = 0) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=RayError, TaskCancelledError=TaskCancelledError)
        self.gpus, self.options, self.is_up = gpus, {}, False
        self.cancelled: list[Any] = []

    def is_initialized(self) -> bool:
        return self.is_up

    def init(self) -> None:
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, **({"GPU": 1.0 * self.gpus} if self.gpus else {})}

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda *given: Reference(function, given))

    def wait(self, references: list[Any], timeout: float = 0, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        if reference in self.cancelled:
            raise TaskCancelledError
        return reference.function(*reference.given)

    def cancel(self, reference: Any, *, force: bool) -> None:
        assert not force, "the run could not save"
        self.cancelled.append(reference)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay(gpus=1)
    monkeypatch.setattr(sweep_launch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def test_without_ray_it_is_refused(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="needs the package ray, which is not installed; install it with pip"):
        run_on_ray(sweep, names_of(sweep), tmp_path, Told())


def test_ray_runs_each_as_a_task_and_keeps_what_failed(
    sweep: Sweep, tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, models = names_of(sweep), {"base_dir": tmp_path}

    def one(given: Sweep, name: str, output: Path, found: dict[str, Path]) -> str:
        assert (given, output, found) == (sweep, tmp_path, models)
        if name == names[1]:
            raise RayError("the worker died")
        return ""

    monkeypatch.setattr(sweep_launch, "run_one", one)
    told = Told()
    run_on_ray(sweep, names, tmp_path, told, models=models)
    assert list(told.failures) == names and told.failures[names[0]] == ""
    assert told.failures[names[1]] == "the Ray task of the run failed: the worker died"
    assert ray.options == {"num_gpus": 1, "max_retries": 0} and not ray.is_up


def test_a_stop_cancels_all_tasks(sweep: Sweep, tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_launch, "run_one", lambda *given: "")
    told = Told()
    run_on_ray(sweep, names_of(sweep), tmp_path, told, cancelled=lambda: bool(told.failures))
    assert list(told.failures.values()) == ["", None, None, None] and len(ray.cancelled) == 3


def test_a_cluster_that_was_there_before_stays(
    sweep: Sweep, tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_launch, "run_one", lambda *given: "")
    ray.is_up, ray.gpus = True, 0
    run_on_ray(sweep, names_of(sweep)[:1], tmp_path, Told())
    assert ray.is_up and ray.options["num_gpus"] == 0
