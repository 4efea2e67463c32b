"""The runs of a sweep reach workers, and whatever happens to them is known afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.core.errors import OptionError, OutputError, TrainingError
from lorasmith.core.files import locked
from lorasmith.runs import sweep_run
from lorasmith.runs.queue import JobStore, jobs_in
from lorasmith.runs.sweep_file import Sweep
from lorasmith.runs.sweep_run import QUEUE, failures_in, grouped, run_sweep, sweep_devices, sweep_folder
from tests.launched import LONG_S
from tests.runs.sweep_cases import ended_with, names_of, sweep_of

WORKER = (sys.executable, str(Path(__file__).parent / "sweep_worker.py"))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_run, "WORKER_COMMAND", WORKER)
    (tmp_path / "acts.json").write_text("{}")
    return sweep_of(tmp_path)


def acts(sweep: Sweep, *wanted: str) -> None:
    Path("acts.json").write_text(json.dumps(dict(zip(sweep.runs, wanted, strict=False))))


class Told:
    """What a command is told, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failures: dict[str, str | None] = {}

    def started(self, name: str, device: str) -> None:
        self.lines.append(f"{name} on {device}")

    def ended(self, name: str, failure: str | None) -> None:
        self.lines.append(f"{name} ended")
        self.failures[name] = failure


def run(
    sweep: Sweep,
    *,
    devices: tuple[str, ...] = ("cpu",),
    together: int = 1,
    alone: bool = True,
    cluster: str | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[Path, Told]:
    output, told = sweep_folder(Path("out").absolute()), Told()
    options = {"together": together, "alone": alone, "cluster": cluster, "cancelled": cancelled}
    run_sweep(sweep, names_of(sweep), output, devices, told, **options)
    return output, told


def log_of(output: Path, name: str) -> str:
    return (output / "logs" / f"{name}.txt").read_text()


def test_all_runs_are_run_in_their_order(sweep: Sweep) -> None:
    output, told = run(sweep)
    names = names_of(sweep)
    assert [line for line in told.lines if " on " in line] == [f"{name} on cpu" for name in names]
    assert told.failures == dict.fromkeys(names, "") == failures_in(output)
    jobs = jobs_in(output / QUEUE)
    assert [(job.id, job.state, job.sweep, dict(job.varied)) for job in jobs] == [
        (name, "completed", "out", sweep.varied[name]) for name in names
    ]
    assert log_of(output, names[0]).startswith("$ lorasmith train ")


def test_each_device_has_one_run_at_a_time_and_sees_its_gpu(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    output, told = run(sweep, devices=("cuda:0", "cuda:1"))
    assert {line.split()[-1] for line in told.lines if " on " in line} <= {"cuda:0", "cuda:1"}
    devices = {job.id: job.device for job in jobs_in(output / QUEUE)}
    seen = {"cuda:0": "sees 4", "cuda:1": "sees 7"}
    for name, device in devices.items():
        assert seen[device or ""] in log_of(output, name)


def test_one_that_fails_or_crashes_its_worker_ends_alone(sweep: Sweep) -> None:
    acts(sweep, "fail", "crash")
    output, told = run(sweep)
    failed, crashed, *others = names_of(sweep)
    assert told.failures[failed] == "there is no usable image"
    assert "it ended with exit status 3; its last line is Segfault" in str(told.failures[crashed])
    assert [told.failures[name] for name in others] == ["", ""]
    assert failures_in(output) == told.failures
    assert "Segfault\n" in log_of(output, crashed) and "error: there is no usable image\n" in log_of(output, failed)
    acts(sweep)
    output, told = run(sweep)
    assert failures_in(output) == dict.fromkeys(sweep.runs, ""), "and is forgotten when it is tried again"


def test_on_a_cluster_a_run_that_lost_its_machine_waits_again(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_run, "bridge_command", lambda address: WORKER)
    acts(sweep, "crash once", "fail", "crash")
    output, told = run(sweep, devices=("ray-0",), cluster="auto")
    lost, failed, broken, complete = names_of(sweep)
    assert told.failures[lost] == told.failures[complete] == ""
    assert told.failures[failed] == "there is no usable image"
    assert "the worker ended" in str(told.failures[broken])
    assert told.lines.count(f"{lost} on ray-0") == 2 and told.lines.count(f"{lost} ended") == 1
    assert told.lines.count(f"{broken} on ray-0") == 5
    assert not [one for one in (output / "logs" / "attempts").iterdir() if one.suffix != ".lock"]


def test_runs_that_train_together_start_together_and_fall_together(sweep: Sweep) -> None:
    acts(sweep, "finish", "crash")
    output, told = run(sweep, together=3)
    names = names_of(sweep)
    assert told.lines[:3] == [f"{name} on cpu" for name in names[:3]]
    assert (told.failures[names[0]], told.failures[names[3]]) == ("", "")
    assert "exit status 3" in str(told.failures[names[1]]) and "exit status 3" in str(told.failures[names[2]])
    assert "beside 2" in log_of(output, names[0]) and "beside 0" in log_of(output, names[3])


def test_a_stop_saves_what_runs_and_starts_nothing(sweep: Sweep) -> None:
    acts(sweep, "finish", "wait")
    output = Path("out")
    output, told = run(sweep, cancelled=lambda: len(list(output.glob("logs/*.txt"))) == 2)
    names = names_of(sweep)
    assert told.failures == dict.fromkeys(names[:2], "") == failures_in(output)
    assert Path("saved").exists()
    assert [job.state for job in jobs_in(output / QUEUE)] == ["completed", "interrupted", "pending", "pending"]


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from lorasmith.runs import sweep_run
from lorasmith.runs.sweep_file import read_sweep
sweep_run.WORKER_COMMAND = sys.argv[2:]
sweep = read_sweep(Path("sweep.toml"))
stop = threading.Event()
def ask(number, frame):
    if stop.is_set():
        raise KeyboardInterrupt
    stop.set()
    os.write(1, b"stopping\\n")  # print is not reentrant, and the signal may come in that of "started"
# Programs that a shell starts in the background ignore the signal.
signal.signal(signal.SIGINT, ask if sys.argv[1] == "twice" else signal.default_int_handler)
class Shown:
    def started(self, name, device):
        print("started", flush=True)
    def ended(self, name, failure):
        pass
try:
    sweep_run.run_sweep(sweep, list(sweep.runs), Path("out").absolute(), ["cpu"], Shown(), cancelled=stop.is_set)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize(("act", "how"), [("wait", "once"), ("deaf", "twice")])
def test_an_interrupt_saves_and_one_after_a_stop_ends_at_once(sweep: Sweep, act: str, how: str) -> None:
    acts(sweep, act)
    sweep_folder(Path("out").absolute())
    command = [sys.executable, "-c", INTERRUPTED, how, *WORKER]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    if how == "twice":
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=LONG_S)
    assert (said, process.returncode) == ("interrupted\n", 0)
    assert Path("saved").exists() == (how == "once")
    first, *others = jobs_in(Path("out") / QUEUE)
    assert (first.state, first.failure) == ("interrupted", "") and {job.state for job in others} == {"pending"}


def test_workers_that_do_not_start_end_the_sweep(sweep: Sweep) -> None:
    Path("broken").touch()
    with pytest.raises(TrainingError, match=r"a worker must start, but .* its last line is no module named torch"):
        run(sweep)


def test_beside_another_process_and_on_a_cluster_ends_are_in_files(sweep: Sweep) -> None:
    acts(sweep, "fail")
    output = sweep_folder(Path("out").absolute())
    with locked(output / "logs" / "sweep.lock", "taken"):
        run(sweep)
    assert not (output / QUEUE).exists() and failures_in(output)[names_of(sweep)[0]] == "there is no usable image"
    acts(sweep, "finish", "fail")
    _, told = run(sweep, alone=False)
    assert failures_in(output) == told.failures and not (output / QUEUE).exists()


def test_ends_of_earlier_versions_count_until_the_run_starts_again(sweep: Sweep) -> None:
    output = sweep_folder(Path("out").absolute())
    ended_with(names_of(sweep)[1], output, "no memory")
    assert failures_in(output) == {names_of(sweep)[1]: "no memory"}
    run(sweep)
    assert failures_in(output) == dict.fromkeys(sweep.runs, "")
    assert not list((output / "logs").glob("*.json"))


def test_a_queue_keeps_the_runs_that_are_complete_and_forgets_those_of_other_files(sweep: Sweep) -> None:
    output = sweep_folder(Path("out").absolute())
    queue = JobStore(output / QUEUE)
    first, *others = names_of(sweep)
    for name in (first, "rank-99"):
        queue.finish(queue.add("train", {}, id=name).id, "completed")
    queue.close()
    run_sweep(sweep, others, output, ["cpu"], Told())
    assert [(job.id, job.attempts) for job in jobs_in(output / QUEUE)] == [(first, 0), *((name, 1) for name in others)]


def numbers(sweep: Sweep, most: int) -> list[list[int]]:
    names = names_of(sweep)
    return [[names.index(name) + 1 for name in group] for group in grouped(sweep.runs, most)]


def test_groups_have_what_is_of_the_model_in_common(tmp_path: Path) -> None:
    rates = "learning_rate = [1e-4, 2e-4, 3e-4]\n"
    assert numbers(sweep_of(tmp_path, rates), 2) == [[1, 2], [3]]
    quantized = sweep_of(tmp_path, 'quantization = ["none", "nf4"]\n' + rates)
    assert numbers(quantized, 8) == [[1, 2, 3], [4, 5, 6]]
    assert numbers(quantized, 2) == [[1, 2], [3], [4, 5], [6]]
    interleaved = sweep_of(tmp_path, rates + 'quantization = ["none", "nf4"]\n')
    assert numbers(interleaved, 2) == [[1, 3], [2, 4], [5], [6]]
    for name in ("compile", "cuda_graphs", "autotune"):
        assert numbers(sweep_of(tmp_path, f"{name} = [true]\n{rates}"), 3) == [[1], [2], [3]]


def test_a_run_s_own_folder_is_no_folder_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    with pytest.raises(OutputError, match="holds a run itself; choose another"):
        sweep_folder(tmp_path)
    assert (sweep_folder(tmp_path / "new" / "one") / "logs").is_dir()


def test_devices_are_those_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert sweep_devices(None) == sweep_devices("cpu") == ("cpu",)
    with pytest.raises(OptionError, match=r"device must be one that is here \(cpu\), got 'cuda:0'"):
        sweep_devices("cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert sweep_devices(None) == sweep_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert sweep_devices("cpu") == ("cpu",)
    for wrong, sentence in {
        "cuda:0,cuda": "must name each device once",
        "cuda:2": "got 'cuda:2'",
        "gpu": "device must be one that is here",
        "": "device must be one",
    }.items():
        with pytest.raises(OptionError, match=sentence):
            sweep_devices(wrong)
