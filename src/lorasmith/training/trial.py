"""Times one way of steps, here or in a process of its own: there, a crash of a compiler or in a capture ends no run.

The process gets the network with its adapters and the batches of a step, and freezes the network itself, so that that
of the run must not be on the device meanwhile. Tensors on memory-mapped files are named by file and place, and mapped
again; all others are sent.

    stdin    a file with a pickle of `_Trial`
    stdout   {"times": {"step": 0.4}} or {"error": "why there are none"}
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.frozen_weights import products_enabled
from lorasmith.adapters.inject import Difference
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.mapped_files import FileState, MappedFile, file_state, place_on_file
from lorasmith.core.printable import first_line, memory_text, time_text
from lorasmith.training.batches import Batch
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.engine import Engine
from lorasmith.training.measured_times import Times
from lorasmith.training.memory.spilling import memory_capped
from lorasmith.training.trainable import Trainable
from lorasmith.training.way import Way

_WARM_UP, _TIMED = 2, 3  # steps
_MOST_BYTES = 2**32  # that are sent
_LOOK_S = 1.0  # between looks at whether the run is cancelled
_GRACE_S = 60.0  # after which a process ends itself if nobody has


class TrialFailed(Exception):  # noqa: N818 - the run takes another way
    """There are no times of a way, for a reason that the text says as a clause; `is_final` if it would recur."""

    def __init__(self, why: str, *, is_final: bool) -> None:
        super().__init__(why)
        self.is_final = is_final


Wait = Callable[["subprocess.Popen[bytes]", float, Callable[[], bool]], tuple[bytes, bytes]]
"""(process, seconds, cancelled) → its stdout and stderr. Raises TimeoutExpired."""


def step_times(engine: Engine, way: Way, batches: Sequence[Batch], clock: Callable[[], float]) -> Times:
    """Seconds of a step in a way (`step`), and of compiling or capturing once (`compiling`)."""
    before, engine.way = engine.way, way
    try:
        with contextlib.ExitStack() as stack:
            if way.products != before.products:
                stack.enter_context(products_enabled(engine.model.module, way.products, before.device))
            stack.enter_context(engine.attached())
            first = _seconds(engine, batches, 1, clock)
            first += _seconds(engine, batches, _WARM_UP, clock)
            step = _seconds(engine, batches, _TIMED, clock) / _TIMED
        once = max(first - (1 + _WARM_UP) * step, 0.0)
        return {"step": step, "compiling": once} if way.compile or way.cuda_graphs else {"step": step}
    finally:
        engine.way = before


def _seconds(engine: Engine, batches: Sequence[Batch], count: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(count):
        engine.gradient(batches)
    if engine.way.device.type == "cuda":
        torch.cuda.synchronize(engine.way.device)
    return clock() - began


def timed_apart(
    engine: Engine,
    way: Way,
    batches: Sequence[Batch],
    limit_s: float,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    wait: Wait | None = None,
) -> Times:
    """As `autotune` times a way, in a process that has `limit_s` seconds. Raises TrialFailed."""
    trial = _Trial(
        engine.model,
        engine.trained.adapters,
        engine.trained.differences,
        engine.text_adapters,
        engine.config,
        engine.way,
        way,
        batches,
        limit_s,
        torch.get_num_threads(),
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    command, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
    is_posix = os.name == "posix"
    with tempfile.TemporaryFile() as given:  # as a wait with a time limit does not go on with writing to a pipe
        given.write(_pickled(trial))
        given.seek(0)
        process = subprocess.Popen(
            command, stdin=given, stdout=pipe, stderr=pipe, env=environment, start_new_session=is_posix
        )
    with process:
        try:
            answer, errors = (wait or _waited)(process, limit_s, cancelled)
        except subprocess.TimeoutExpired:
            why = "the run was cancelled" if cancelled() else f"took more than {time_text(limit_s)}"
            raise TrialFailed(why, is_final=False) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                if is_posix:
                    os.killpg(process.pid, signal.SIGKILL)  # and what compiles for it
                else:
                    process.kill()
    try:
        found = json.loads(answer)
    except ValueError:
        is_crash = process.returncode not in (-9, -15)  # as others kill
        raise TrialFailed(_end(process.returncode, errors), is_final=is_crash) from None
    if "times" not in found:
        why = str(found["error"])
        # A card may be kept for one process alone, or be full of other programs.
        is_beside = is_out_of_memory(RuntimeError(why)) or "busy or unavailable" in why
        raise TrialFailed(why, is_final=not is_beside)
    times: Times = found["times"]
    return times


def _waited(process: subprocess.Popen[bytes], limit_s: float, cancelled: Callable[[], bool]) -> tuple[bytes, bytes]:
    until = time.monotonic() + limit_s
    while True:
        try:
            return process.communicate(timeout=_LOOK_S)
        except subprocess.TimeoutExpired:
            if cancelled() or time.monotonic() > until:
                raise


def _end(code: int, errors: bytes) -> str:
    """How a process without an answer ended."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    said = f" ({lines[-1].strip()})" if lines else ""
    return f"its process ended with {code} and no answer{said}"


@dataclass(frozen=True)
class _Trial:
    """What a process is given, and does."""

    model: Trainable
    adapters: Mapping[str, Adapter]
    differences: Mapping[str, Difference]
    text_adapters: Mapping[str, Adapter]
    config: ResolvedConfig
    before: Way  # in which the network is frozen
    way: Way
    batches: Sequence[Batch]
    limit_s: float
    threads: int

    def times(self) -> Times:
        torch.set_num_threads(self.threads)
        device = self.before.device
        engine = Engine(self.model, self.adapters, self.config, self.before, self.differences, self.text_adapters)
        on_gpu = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_gpu, memory_capped(device, self.before.memory_cap), engine.frozen():
            return step_times(engine, self.way, self.batches, time.perf_counter)


def _pickled(trial: _Trial) -> bytes:
    """Raises TrialFailed for what cannot be sent."""
    written = io.BytesIO()
    try:
        _Writer(written, protocol=pickle.HIGHEST_PROTOCOL).dump(trial)
    except TrialFailed:
        raise
    except Exception as error:  # of anybody's class
        raise TrialFailed(
            f"the model cannot be sent to another process ({first_line(error)})", is_final=False
        ) from error
    return written.getvalue()


class _Writer(pickle.Pickler):
    """Writes the memory of tensors once, or the place of it in a file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is another's later
        self._sent = 0

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        memory = obj._untyped_storage
        key, is_known = memory._cdata, memory._cdata in self._known
        if is_known:
            return obj.dtype, key, None, None
        self._known[key] = memory
        content = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
        if (found := place_on_file(content)) is not None:
            return obj.dtype, key, None, (*found, content.numel())
        self._sent += content.nbytes
        if self._sent > _MOST_BYTES:
            raise TrialFailed(
                f"more than {memory_text(_MOST_BYTES)} of the model are not in its files, but changed in memory",
                is_final=False,
            )
        return obj.dtype, key, str(memory.device), content.cpu().numpy().tobytes()


class _Reader(pickle.Unpickler):
    """Reads what `_Writer` wrote. Raises OSError if a file was replaced meanwhile."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[int, torch.UntypedStorage] = {}
        self._files: dict[str, MappedFile] = {}

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        dtype, key, device, content = pid
        if device is not None:
            raw = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)
            self._known[key] = raw.to(device).untyped_storage()
        elif content is not None:
            self._known[key] = self._on_file(*content).untyped_storage()
        wrapped: Any = torch.storage.TypedStorage
        found: torch.storage.TypedStorage = wrapped(wrap_storage=self._known[key], dtype=dtype, _internal=True)
        return found

    def _on_file(self, file: FileState, offset: int, size: int) -> torch.Tensor:
        path = Path(file.path)
        if path.as_posix() not in self._files:
            if file_state(path) != file:
                raise OSError(f"{path} was replaced")
            self._files[path.as_posix()] = MappedFile(path)
        return self._files[path.as_posix()].tensor(offset, torch.uint8, (size,))


def _main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what compilers print is no answer
    try:
        trial: _Trial = _Reader(sys.stdin.buffer).load()
        faulthandler.dump_traceback_later(trial.limit_s + _GRACE_S, exit=True)
        answer: dict[str, object] = {"times": dict(trial.times())}
    except Exception as error:  # of compilers, of any kind
        answer = {"error": first_line(error)}
    os.write(answers, json.dumps(answer).encode())


if __name__ == "__main__":
    _main()
