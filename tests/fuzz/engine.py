"""Runs cases of the fuzz, and judges what happened.

A case is a kind and a seed. It writes files into an empty folder and returns doors: functions that read them as users
do. A door must succeed, or raise one `LorasmithError` in one line of at most 300 characters. It must not raise anything
else, take more than two seconds of processor time or 512 MB beyond its files, say control characters or marks of
direction, apply NaN, leave tensors out in silence (the kinds look for these two and raise `FaultError`), open a file
outside of the folder, start a process, connect, or import what a file names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer.main

import lorasmith
from lorasmith.core.errors import GraphError, LorasmithError
from lorasmith.data.encoding_cache import FOLDER_VARIABLE
from tests.fuzz.mutators import CANARY

_GET_COMMAND = typer.main.get_command
_PACKAGE = str(Path(lorasmith.__file__).parent)

Door = tuple[str, Callable[[], "str | None"]]
"""Name of a way to read a case's files, and a function that does so and returns what was said."""

LONGEST = 300
_SECONDS = 2.0
_IDLE_S = 0.5
"""Wall time; a door that uses no processor time in several of these in a row waits for something."""
_MEMORY = 512 * 2**20
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class FaultError(Exception):
    """A door did something that it must not do.

    Args:
        fault: what, the same for all cases of one fault.
        detail: values of this case.
    """

    def __init__(self, fault: str, detail: object = "") -> None:
        super().__init__(fault)
        self.fault, self.detail = fault, str(detail)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the kind.
        share: of all cases, in percent.
        doors: (generator, empty folder) → the doors, with the files written.
    """

    name: str
    share: int
    doors: Callable[[random.Random, Path], Sequence[Door]]


@dataclass(frozen=True)
class Finding:
    """What one door did in one case.

    Attributes:
        kind, seed: the case.
        door: name of the door.
        fault: what it did; of an exception the type, and the function of ours that it left last.
        detail: values of this case.
    """

    kind: str
    seed: int
    door: str
    fault: str
    detail: str = ""

    @property
    def summary(self) -> str:
        """Door and fault."""
        return f"{self.door}: {self.fault}"

    def __str__(self) -> str:
        return f"{self.kind} {self.seed}  # {self.summary} {ascii(self.detail)[:160] if self.detail else ''}"


def run_case(kind: Kind, seed: int) -> list[Finding]:
    """The findings of one case, after `kinds.prepare()`; its files are gone afterwards."""
    rng = random.Random(f"{kind.name}:{seed}")
    found = []
    with _case_folder() as folder:
        with _watched(folder):  # a case may make links, and must not write through one
            doors = kind.doors(rng, folder)
        size = sum(path.lstat().st_size for path in folder.rglob("*"))
        for name, door in doors:
            found += [Finding(kind.name, seed, name, one.fault, one.detail) for one in _judged(door, folder, size)]
    return found


def command(*arguments: object) -> str:
    """What a command prints. Raises FaultError if it ends with more than one line of complaint."""
    from lorasmith.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    before, sys.argv = sys.argv, ["lorasmith", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            patch.object(typer.main, "get_command", _commands),
        ):
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
    finally:
        sys.argv = before
    complaint = err.getvalue().rstrip("\n")
    if code not in (0, 1):
        raise FaultError("ended with another exit status", f"{code}: {complaint[-200:]}")
    if arguments[0] != "run":
        _check_refusal(complaint.removeprefix("error: "))
    return out.getvalue() + complaint


def printed(*texts: str) -> str:
    """What the command line prints of texts that a library function returns."""
    from lorasmith.cli.console import print_note

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for text in texts:
            print_note(text)
    return out.getvalue()


@functools.cache
def _commands(app: typer.Typer) -> Any:
    """The commands of an app, made of all flags once: that takes longer than most cases."""
    return _GET_COMMAND(app)


@contextlib.contextmanager
def _case_folder() -> Iterator[Path]:
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="fuzz-")))
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def _judged(door: Callable[[], str | None], folder: Path, size: int) -> Iterator[FaultError]:
    started, before = time.process_time(), _memory(reset=True)
    said: str | None = None
    try:
        temporary = patch.object(tempfile, "tempdir", str(folder))
        cache = patch.dict(os.environ, {FOLDER_VARIABLE: str(folder / ".cache")})  # a case may have its encodings kept
        with _watched(folder) as seen, temporary, cache, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                said = door()
            except LorasmithError as error:
                said = str(error)
                if not isinstance(error, GraphError):  # which has a line for each finding
                    _check_refusal(said)
    except FaultError as fault:
        if fault not in seen:
            yield fault
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        yield _escaped(error)
    yield from seen[:3]
    if (seconds := time.process_time() - started) > _SECONDS:
        yield FaultError("took too long", f"{seconds:.1f} s of processor time")
    if (more := _memory() - before) > _MEMORY + size:
        yield FaultError("took too much memory", f"{more / 2**20:.0f} MB")
    if said and (match := _CONTROL.search(said)):
        yield FaultError("said a control character", said[max(0, match.start() - 40) : match.end() + 20])


def _check_refusal(sentence: str) -> None:
    if "\n" in sentence:
        raise FaultError("refused in more than one line", sentence)
    if len(sentence) > LONGEST:
        raise FaultError("refused in more than 300 characters", f"{len(sentence)}: {sentence}")


def _escaped(error: BaseException) -> FaultError:
    """An exception that is none of ours, with the function of ours that it left last."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if _is_inside(one.filename, _PACKAGE)]
    where = "no function of ours"
    if frames:
        where = f"{Path(frames[-1].filename).relative_to(_PACKAGE).as_posix()} {frames[-1].name}"
    return FaultError(f"{type(error).__name__} in {where}", error)


def _memory(*, reset: bool = False) -> int:
    """Peak of the resident memory in bytes; `reset` sets the peak to the present, where the system can."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    except (OSError, TypeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class _Watch:
    """What the audit hook, which cannot be removed, looks at; nothing while there is no folder."""

    folder: str | None = None
    seen: list[FaultError] = field(default_factory=list)
    is_installed: bool = False


_WATCH = _Watch()
_OURS = (
    str(Path(__file__).parents[2]),
    *{os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)},
    "/proc",
    "/sys",
    "/dev/null",
    "/dev/urandom",
    "/usr/share",
    "/usr/lib",
    "/etc/mime.types",
    "/etc/localtime",
)
"""What the program itself may read: its own code and assets, and what the system says of itself."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"), slice(1)),
    **dict.fromkeys(("os.symlink", "os.link"), slice(1, 2)),
    "os.rename": slice(2),
}
"""Event → which of its arguments are the places that change."""
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "socket.connect",
          "socket.getaddrinfo", "webbrowser.open", "pickle.find_class")  # fmt: skip
_STRANGERS = (CANARY, "antigravity", "this")


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[list[FaultError]]:
    """Inside, what happens outside of the folder is noted, and an alarm ends what waits for ever."""
    if not _WATCH.is_installed:
        sys.dont_write_bytecode = True  # of modules that are imported on the way
        sys.addaudithook(_hear)
        sys.meta_path.insert(0, _Importer())
        _WATCH.is_installed = True

    used, idle = time.process_time(), 0

    def rung(number: int, frame: object) -> None:
        nonlocal used, idle
        now = time.process_time()
        used, idle = now, 0 if now - used > _IDLE_S / 100 else idle + 1
        if idle == 4:
            raise FaultError("hung")

    seen: list[FaultError] = []
    previous = signal.signal(signal.SIGALRM, rung)
    signal.setitimer(signal.ITIMER_REAL, _IDLE_S, _IDLE_S)
    _WATCH.folder, _WATCH.seen = str(folder), seen
    try:
        yield seen
    finally:
        _WATCH.folder = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _WATCH.folder
    if folder is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or path is None:
            return
        if isinstance(flags, int) and flags & _WRITES:
            _refuse_change("wrote", path, folder)
        elif not any(_is_inside(_absolute(path), place) for place in (folder, *_OURS)):
            # Noted only: the links in a folder of pictures may lead to others elsewhere.
            _noted(FaultError("read outside of its folder", path))
    elif event in _CHANGES:
        for place in arguments[_CHANGES[event]]:
            if isinstance(place, str | bytes | os.PathLike):
                _refuse_change(event, place, folder)
    elif event in _NEVER:
        raise _noted(FaultError(event, arguments[0]))


def _refuse_change(what: str, path: str | bytes | os.PathLike[Any], folder: str) -> None:
    """Raise FaultError before something outside of the folder is changed, links followed."""
    # What removes and renames acts on a link itself, what opens follows it.
    parent, name = os.path.split(_absolute(path))
    place = os.path.realpath(_absolute(path)) if what == "wrote" else f"{os.path.realpath(parent)}{os.sep}{name}"
    if not _is_inside(place, folder) and place != os.devnull:
        raise _noted(FaultError(f"{what} outside of its folder", path))


class _Importer(importlib.abc.MetaPathFinder):
    """Stands before the other finders, and refuses modules that only a file can have named."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if _WATCH.folder is not None and fullname.partition(".")[0] in _STRANGERS:
            raise _noted(FaultError("imported what a file names", fullname))


def _noted(fault: FaultError) -> FaultError:
    """Keep a fault, since what is raised where it happens may be caught there."""
    _WATCH.seen.append(fault)
    return fault


def _absolute(path: str | bytes | os.PathLike[Any]) -> str:
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100  resolve() follows links


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}{os.sep}")
