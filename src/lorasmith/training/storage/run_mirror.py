"""A copy of a run's folder at a URL, from which another machine continues the run.

    URL/manifest.json           step, and name, size, SHA-256 and object of each file
    URL/states/step-000100...   the files by their names
    URL/.versions/<SHA-256>     new contents of a file whose old ones the manifest still names

Files are written in the folder first and uploaded by a thread, the manifest last, so that it names a whole run at any
moment; what it no longer names is removed afterwards. A store that cannot be reached ends no run: the upload is tried
again until the run ends. A manifest is a stranger's, so that its names and digests are checked before anything is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import urlsplit

from lorasmith.core.errors import LorasmithError, OptionError, OutputError
from lorasmith.core.fence import check_fence
from lorasmith.core.files import ensure_folder, is_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import memory_text
from lorasmith.core.stores import STORES, UnreachableError, checked_name, open_store, reached
from lorasmith.core.typed_json import typed
from lorasmith.formats.metadata import sha256_file
from lorasmith.training.events import Event, EventHandler, RunStarted, StateSaved, Warned
from lorasmith.training.run_requests import REQUESTS
from lorasmith.training.storage.fingerprint import Fingerprint
from lorasmith.training.storage.records import RECORD
from lorasmith.training.storage.run_folder import PREVIEW_LORA, RunFolder, is_same_or_longer
from lorasmith.training.storage.run_states import STATES, free_bytes

MANIFEST = "manifest.json"
_REPLACED, _FETCHED = ".versions", ".fetched"
_MOST_BYTES, _MOST_FILES = 2**26, 100_000  # of a manifest
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_AT_END_S = 60.0  # for which a store that fails is tried after the end of the run


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file of a run in its mirror; `object` is relative to the URL."""

    object: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """What a mirror holds."""

    step: int  # of the newest run state, 0 without one
    writer: str  # the process that wrote it
    fingerprint: dict[str, Any]
    files: dict[str, _File] = field(default_factory=dict)

    def check(self, url: str) -> None:
        """Raise OutputError if a name leads out of a folder, or two files are one object with two contents."""
        for name, file in self.files.items():
            checked_name(name, url, OutputError)
            is_digest = len(file.sha256) == 64 and not set(file.sha256) - set("0123456789abcdef")
            if _is_left_out(name) or not is_digest or file.object not in (name, f"{_REPLACED}/{file.sha256}"):
                raise OutputError(f"{url}/{MANIFEST} names {name!r} in a way that no run does; name another mirror")
        if RECORD not in self.files:
            raise OutputError(f"{url}/{MANIFEST} must name {RECORD}, and does not; name another mirror")


class _GivenUpError(OutputError):
    """What another try would not change."""


class _ChangedError(Exception):
    """A file of the run was replaced while it was read."""


def checked_mirror(url: str) -> str:
    """The URL of a mirror. Raises OptionError for one that is none."""
    scheme = url.partition("://")[0]
    parts = urlsplit(url)
    if scheme not in STORES or not parts.netloc or not parts.path.strip("/") or parts.query or parts.fragment:
        shown = ", ".join(f"{name}://" for name in STORES)
        raise OptionError(f"a mirror must be a folder in a bucket of {shown}, such as s3://bucket/dog, got {url!r}")
    for part in parts.path.strip("/").split("/"):
        checked_name(part, url, OptionError)
    return url


def mirror_of(url: str, folder: Path) -> str:
    """The URL of a run's mirror: below a URL that ends in /, that of the name of its folder."""
    return f"{url}{folder.resolve().name}" if url.endswith("/") else url


def title_of(url: str) -> str:
    """The last part of a mirror's URL, after which its folder on this machine is named."""
    return PurePosixPath(urlsplit(url).path).name


def restore(url: str, folder: RunFolder, on_event: EventHandler) -> None:
    """Fetch a run, with a `Warned`, into a folder that is claimed and has none, or has it at an earlier step.

    Raises UnreachableError if the store cannot be used, and OutputError if the run there is another one, or its bytes
    are not those that were uploaded.
    """
    store, root = _opened(url)
    with reached(url, UnreachableError):
        manifest = _read(store, root, url)
    if manifest is None:
        return
    if folder.exists:
        _check_same(url, manifest, folder.record().fingerprint)
        if folder.is_done or manifest.step <= _step_of(folder):
            return
    needed = sum(file.size for file in manifest.files.values())
    if (free := free_bytes(folder.path)) < needed:
        raise OutputError(
            f"the run at {url} has {memory_text(needed)}, and {memory_text(free)} are free for {folder.path}; free "
            "some space, or choose another output"
        )
    place = folder.path / _FETCHED
    shutil.rmtree(place, ignore_errors=True)
    for name, file in manifest.files.items():
        target = place / name
        ensure_folder(target.parent)
        with reached(url, UnreachableError):
            store.get_file(f"{root}/{file.object}", str(target))
        if target.stat().st_size != file.size or sha256_file(target) != file.sha256:
            raise OutputError(f"{name} at {url} has not the bytes that were uploaded; start fresh with another mirror")
    # The record first: a folder with it is a run, whose step says that the rest is to be fetched again.
    for name in sorted(manifest.files, key=lambda name: name != RECORD):
        ensure_folder((folder.path / name).parent)
        (place / name).replace(folder.path / name)
    shutil.rmtree(place, ignore_errors=True)
    on_event(Warned(message=f"The run at {url} was fetched to {folder.path}, at step {manifest.step}."))


def upload(url: str, folder: RunFolder) -> None:
    """Upload a run that nobody trains. Raises OutputError if the mirror is that of another run, or cannot be used."""
    _Uploader(url, folder).upload()


class RunMirror:
    """Keeps the mirror of a run that is trained; called with its events.

    `emit` receives a `Warned` when the store cannot be used, and when it can again, in the thread of the run.
    """

    def __init__(self, url: str, folder: RunFolder, emit: EventHandler) -> None:
        self.url = url
        self._folder = folder.path
        _opened(url)  # a package that is missing is said before the first step
        self._uploader = _Uploader(url, folder)
        self._emit = emit
        self._sentences: deque[str] = deque()
        self._changed = threading.Condition()
        self._asked = self._done = 0
        self._fault = ""
        self._is_over = self._is_given_up = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)  # a store may hang at the end
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted | StateSaved):
            self._ask()
        while self._sentences:
            self._emit(Warned(message=self._sentences.popleft()))

    def finish(self) -> None:
        """Upload what the run has now. A store that fails is tried for a minute, one that works has its time."""
        self._ask()
        until = time.monotonic() + _AT_END_S
        with self._changed:
            while self._done < self._asked and not self._is_given_up:
                if self._fault and time.monotonic() >= until:
                    break
                self._changed.wait(0.5)
            fault, is_whole = self._fault, self._done == self._asked
            self._is_over = True
            self._changed.notify_all()
        if not is_whole and not self._is_given_up:
            self._sentences.append(
                f"The mirror at {self.url} lacks the last steps of this run ({fault}), which is whole in "
                f"{self._folder}; type lorasmith resume {self._folder} --mirror {self.url} when it can be used again"
            )
        while self._sentences:
            self._emit(Warned(message=self._sentences.popleft()))

    def _ask(self) -> None:
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def _work(self) -> None:
        tries = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._done < self._asked)
                if self._is_over:
                    return
                asked = self._asked
            try:
                self._uploader.upload()
                fault = ""
            except LorasmithError as error:
                fault = str(error)
                self._is_given_up = isinstance(error, _GivenUpError)
            except Exception as error:  # of any kind, as the run must go on
                fault = f"{type(error).__name__}: {error}"
            with self._changed:
                if fault and self._is_given_up:
                    self._sentences.append(f"The run is mirrored no longer: {fault}.")
                elif fault and not self._fault:
                    self._sentences.append(f"The run is not mirrored: {fault}. It continues, and this is tried again.")
                elif self._fault and not fault:
                    self._sentences.append(f"The run is mirrored at {self.url} again.")
                self._fault = fault
                if self._is_given_up:
                    self._changed.notify_all()
                    return
                if not fault:
                    self._done, tries = asked, 0
                    self._changed.notify_all()
                    continue
                self._changed.wait_for(lambda: self._is_over, min(_FIRST_PAUSE_S * 2**tries, _LONGEST_PAUSE_S))
                tries = min(tries + 1, 10)


class _Uploader:
    """Uploads a run's folder as it is at that time."""

    def __init__(self, url: str, folder: RunFolder) -> None:
        self._url = url
        self._folder = folder
        self._writer = uuid.uuid4().hex
        self._expected: str | None = None  # who wrote the last manifest that was read or written here
        self._digests: dict[str, tuple[tuple[int, int, int], _File]] = {}  # by name: state of the file, and what it was

    def upload(self) -> None:
        """Upload what the manifest does not have, then a new manifest. Raises OutputError."""
        for _ in range(10):
            with contextlib.suppress(_ChangedError):
                self._upload()
                return
        raise OutputError(f"files of {self._folder.path} change too fast to be mirrored")

    def _upload(self) -> None:
        store, root = _opened(self._url)
        with reached(self._url, UnreachableError):
            before = _read(store, root, self._url)
        self._check(before)
        names = _names(self._folder.path)
        step = max(map(_step_in, names), default=0)
        if before is not None and before.step > step:
            return  # a later state of this run, which is kept until this process is there
        known = {} if before is None else before.files
        files = {name: self._uploaded(name, known.get(name), store, root) for name in names}
        check_fence()
        fingerprint = dict(self._folder.record().fingerprint)
        manifest = _Manifest(step=step, writer=self._writer, fingerprint=fingerprint, files=files)
        with reached(self._url, UnreachableError):
            store.pipe_file(f"{root}/{MANIFEST}", json.dumps(asdict(manifest)).encode())
        self._expected = self._writer
        kept = {file.object for file in files.values()}
        for file in known.values():
            if file.object not in kept:
                with contextlib.suppress(Exception):  # of any kind: it takes space and nothing else
                    store.rm_file(f"{root}/{file.object}")

    def _check(self, before: _Manifest | None) -> None:
        writer = None if before is None else before.writer
        if before is not None:
            _check_same(self._url, before, self._folder.record().fingerprint)
        if self._expected is not None and writer != self._expected:
            raise _GivenUpError(f"another process writes to {self._url}, which continues this run; stop one of the two")
        self._expected = writer

    def _uploaded(self, name: str, known: _File | None, store: Any, root: str) -> _File:
        """The file in the mirror, uploaded unless it is there. Raises _ChangedError if it was replaced meanwhile."""
        path = self._folder.path / name
        state = _state_of(path)
        before, file = self._digests.get(name, (None, None))
        if file is not None and before == state and file == known:
            return file
        with _still(path) as copy:
            try:
                file = _File(object=name, size=copy.stat().st_size, sha256=sha256_file(copy))
                if known is not None and (known.size, known.sha256) == (file.size, file.sha256):
                    file = known
                elif known is not None and known.object == name:  # whose bytes the manifest that is there names
                    file = replace(file, object=f"{_REPLACED}/{file.sha256}")
                if file != known:
                    with reached(self._url, UnreachableError):
                        store.put_file(str(copy), f"{root}/{file.object}")
            except (OutputError, OSError) as error:
                if not is_regular(path):
                    raise _ChangedError from error
                raise
        if copy == path and _state_of(path) != state:
            raise _ChangedError
        self._digests[name] = state, file
        return file


def _opened(url: str) -> tuple[Any, str]:
    return open_store(checked_mirror(url), OutputError, schemes=STORES, what="runs are mirrored")


def _read(store: Any, root: str, url: str) -> _Manifest | None:
    """What a mirror holds; None if nothing was uploaded yet. Raises OutputError if it is no run's."""
    path = f"{root}/{MANIFEST}"
    try:
        size = store.info(path)["size"]
    except FileNotFoundError:
        return None
    try:
        if size > _MOST_BYTES:
            raise ValueError(f"has more than {_MOST_BYTES:,} bytes")
        manifest = typed(parse_foreign_json(store.cat_file(path)), _Manifest)
        if len(manifest.files) > _MOST_FILES or manifest.step < 0:
            raise ValueError(f"has more than {_MOST_FILES:,} files, or a step below 0")
    except ValueError as error:
        raise OutputError(f"{url}/{MANIFEST} must be that of a run, but {error}; name another mirror") from error
    manifest.check(url)
    return manifest


def _check_same(url: str, manifest: _Manifest, fingerprint: Fingerprint) -> None:
    if not is_same_or_longer(cast("Fingerprint", manifest.fingerprint), fingerprint):
        raise _GivenUpError(f"{url} holds another run; name another mirror")


def _step_of(folder: RunFolder) -> int:
    """The step of the newest run state, 0 without one."""
    return max((_step_in(f"{STATES}/{path.name}") for path in folder.states().paths()), default=0)


def _step_in(name: str) -> int:
    found = re.fullmatch(STATES + r"/step-(\d{1,18})\.safetensors", name)
    return int(found[1]) if found else 0


def _names(folder: Path) -> list[str]:
    """The files of a run that are mirrored, relative and with /; links are not."""
    found = []
    for place, folders, files in os.walk(folder):
        inner = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if not _is_left_out((inner / name).as_posix())]
        for name in files:
            path = Path(place, name)
            if not _is_left_out((inner / name).as_posix()) and is_regular(path) and not path.is_symlink():
                found.append((inner / name).as_posix())
    return sorted(found)


def _is_left_out(name: str) -> bool:
    """Whether a file is no part of a run, as those of its lock and those that are being written."""
    return name in (PREVIEW_LORA, MANIFEST) or name.split("/")[0] == REQUESTS or name.startswith(".") or "/." in name


def _state_of(path: Path) -> tuple[int, int, int]:
    """What differs when a file was replaced or written to. Raises _ChangedError if it is gone."""
    try:
        found = path.stat()
    except OSError as error:
        raise _ChangedError from error
    return found.st_ino, found.st_mtime_ns, found.st_size


@contextlib.contextmanager
def _still(path: Path) -> Iterator[Path]:
    """A file whose bytes stay: a copy, but for tensors, which are replaced as a whole."""
    if path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lorasmith-mirror-") as place:
        try:
            yield Path(shutil.copyfile(path, Path(place, path.name)))
        except FileNotFoundError as error:
            raise _ChangedError from error
