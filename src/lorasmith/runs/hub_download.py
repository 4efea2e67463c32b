"""Files from the hub: what it says of them, and their download, by the command line or by a child process of a server.

A download goes to a file `.part` beside its place, continues there after whatever stopped it, and gets its name when
its digest is that of the hub: SHA-256, or of small files, which are in git itself, the SHA-1 of git's object. Requests,
redirects, retries and tokens are huggingface_hub's, with its environment variables (`HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_OFFLINE`); nothing else here uses the network. The child process is `python -m lorasmith.runs.hub_download`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorasmith.core.errors import CancelledError, ModelError, OutputError
from lorasmith.core.extras import model_packages
from lorasmith.core.files import ensure_folder, locked
from lorasmith.core.printable import memory_text
from lorasmith.runs.child_process import channel_of_child
from lorasmith.runs.worker import how_it_ended


@dataclass(frozen=True)
class HubFile:
    """A file on the hub, and where it goes."""

    repository: str  # `owner/name`
    file: str  # path in it
    path: Path

    @property
    def part(self) -> Path:
        """Where its bytes are until they are verified."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def kept_bytes(self) -> int:
        """Bytes of it that an earlier download left."""
        with contextlib.suppress(OSError):
            return self.part.stat().st_size
        return 0


@dataclass(frozen=True)
class HubFacts:
    """What the hub says of a file."""

    size_bytes: int
    digest: str  # SHA-256, or SHA-1 of git's object; hexadecimal
    commit: str  # whose file it is


@dataclass(frozen=True)
class Progress:
    """How far a download of several files is."""

    file: str  # name of the current one
    done_bytes: int
    total_bytes: int
    bytes_per_s: float  # of the last seconds; 0 if nothing arrived
    is_checking: bool = False  # whether the file is being verified


class HubError(ModelError):
    """A file of the hub cannot be had."""


class GatedError(HubError):
    """The hub gives a file only to those who have accepted its licence. `details` says where, and whether there is a
    token.
    """

    def __init__(self, message: str, *, accept: str, has_token: bool) -> None:
        super().__init__(message)
        self.details = {"accept": accept, "has_token": has_token}


class NoNetworkError(HubError):
    """The hub does not answer. `details` says which files are to be put where instead: JSON values."""

    def __init__(self, files: Sequence[HubFile]) -> None:
        endpoint = hub_constants().ENDPOINT
        rows = [
            {"file": file.file, "page": f"{endpoint}/{file.repository}", "folder": str(file.path.parent)}
            for file in files
        ]
        places = ", ".join(f"{row['file']} of {row['page']} into {row['folder']}" for row in rows)
        super().__init__(
            f"no internet just now, or {endpoint} does not answer; try again, or add the files yourself: {places}"
        )
        self.details = {"files": rows}


def facts_of_all(files: Sequence[HubFile]) -> dict[HubFile, HubFacts]:
    """`facts_of` each. Raises as it, but a NoNetworkError names all files."""
    try:
        return {file: facts_of(file) for file in files}
    except NoNetworkError as error:
        raise NoNetworkError(files) from error


@model_packages("a download from the hub")
def facts_of(file: HubFile) -> HubFacts:
    """Ask the hub for the size and the digest of a file. Raises HubError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _explained(file):
        metadata = get_hf_file_metadata(hf_hub_url(file.repository, file.file), token=hub_token())
    is_digest = re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", metadata.etag or "")
    if metadata.size is None or metadata.size < 0 or not is_digest or metadata.commit_hash is None:
        raise HubError(
            f"{hub_constants().ENDPOINT} names no size and digest of {file.file}, so it cannot be verified; get it "
            f"from there and put it into {file.path.parent}"
        )
    return HubFacts(metadata.size, str(metadata.etag), metadata.commit_hash)


@model_packages("a download from the hub")
def files_of(repository: str, folder: Path) -> list[HubFile]:
    """Ask the hub for the files of a model of transformers, and where they go: weights as safetensors, and what its
    configuration and tokenizers are in, `config.json` last, so that a folder with it is whole. Raises HubError.
    """
    from huggingface_hub import HfApi

    with _explained(HubFile(repository, "all files", folder / "all files")):
        info = HfApi(endpoint=hub_constants().ENDPOINT, token=hub_token()).model_info(repository)
    names = [sibling.rfilename for sibling in info.siblings or () if re.fullmatch(_WANTED, sibling.rfilename)]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise HubError(
            f"{repository} has no model in safetensors any more; look for another one at {hub_constants().ENDPOINT}"
        )
    if len(names) > _MOST_FILES:
        raise HubError(f"{repository} has {len(names):,} files, and a model has {_MOST_FILES} at most; use another one")
    names.sort(key=lambda name: (name == "config.json", not name.endswith(".safetensors"), name))
    return [HubFile(repository, name, folder / name) for name in names]


_MOST_FILES = 500
_WANTED = r"[\w.\-]+\.(safetensors|json|txt|model|jinja)"  # no folders, and no other formats of the same weights


def check_space(files: Mapping[HubFile, HubFacts], spare_bytes: int = 0) -> None:
    """Raise OutputError if the rest of files would leave less than `spare_bytes` on a disk."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for file, facts in files.items():
        folder = next(parent for parent in file.path.parents if parent.exists())
        disk = folder.stat().st_dev
        folders[disk] = folder
        needed[disk] = needed.get(disk, 0) + max(0, facts.size_bytes - file.kept_bytes)
    for disk, folder in folders.items():
        free = max(0, shutil.disk_usage(folder).free - spare_bytes)
        if needed[disk] > free:
            raise OutputError(
                f"{memory_text(needed[disk])} must fit on the disk of {folder}, and {memory_text(free)} may be used; "
                "free some space"
            )


def download(
    files: Sequence[HubFile],
    *,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    cancelled: threading.Event | None = None,
    spare_bytes: int = 0,
) -> None:
    """Download files that are not there, one after another.

    Nothing is downloaded if not all of them can be had and fit on the disk, with `spare_bytes` to spare. Raises
    HubError, OutputError, and CancelledError soon after `cancelled` is set.
    """
    cancelled = cancelled or threading.Event()
    facts = facts_of_all([file for file in files if not file.path.exists()])
    check_space(facts, spare_bytes)
    total, rate = sum(fact.size_bytes for fact in facts.values()), _Rate()
    before, name = 0, ""

    def report(size: int, *, is_checking: bool = False) -> None:
        if cancelled.is_set():
            raise CancelledError(f"the download of {name} was stopped; get it again to continue")
        done = before + size
        on_progress(Progress(name, done, total, 0.0 if is_checking else rate.after(done), is_checking))

    for file, entry in facts.items():
        name = file.path.name
        ensure_folder(file.path.parent)
        with locked(Path(f"{file.part}.lock"), f"{file.path.name} is being downloaded by another process"):
            _fetch(file, entry, report, spare_bytes)
            _verify(file, entry, report)
        before += entry.size_bytes


def store_token(token: str) -> None:
    """Store an access token where huggingface_hub keeps it, if the hub knows it. Raises HubError."""
    with model_packages("a token of the hub"):
        from huggingface_hub import login
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library that it uses
    constants = hub_constants()
    try:
        login(token=token.strip())
    except (HTTPError, OSError, ValueError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) is None and not isinstance(error, ValueError):
            raise HubError(f"no internet just now, or {constants.ENDPOINT} does not answer; try again later") from error
        raise HubError(
            f"the hub does not know this token; make one at {constants.ENDPOINT}/settings/tokens and paste it whole"
        ) from error


def _fetch(file: HubFile, facts: HubFacts, report: Callable[..., None], spare_bytes: int) -> None:
    """Bring the part to its full size, as long as the disk keeps `spare_bytes`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # names that its lazy import hides
        build_hf_headers,
        disable_progress_bars,
    )

    disable_progress_bars()
    kept = file.kept_bytes
    if kept > facts.size_bytes:
        file.part.unlink()
        kept = 0
    report(kept)
    if kept == facts.size_bytes:
        return
    with _explained(file), file.part.open("ab") as opened:
        http_get(
            hf_hub_url(file.repository, file.file, revision=facts.commit),
            cast(BinaryIO, _Part(opened, file, facts, report, spare_bytes)),
            resume_size=kept,
            headers={**build_hf_headers(token=hub_token()), "Accept-Encoding": "identity"},
            expected_size=facts.size_bytes,
        )


class _Part:
    """A part, which reports its size as it grows, and ends a download that does not."""

    def __init__(
        self, file: BinaryIO, place: HubFile, facts: HubFacts, report: Callable[[int], None], spare_bytes: int
    ) -> None:
        self._file = file
        self._place = place
        self._size_bytes = facts.size_bytes
        self._report = report
        self._spare_bytes = spare_bytes
        self._restarts = 0
        self.tell, self.seek = file.tell, file.seek

    def truncate(self) -> int:
        """Drop what is behind the position, as the hub sends all again."""
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            raise HubError(
                f"the hub begins {self._place.file} again after each broken connection; try again on another network"
            )
        return self._file.truncate()

    def write(self, block: bytes) -> int:
        if self._file.tell() + len(block) > self._size_bytes:
            self._file.truncate(0)
            raise HubError(
                f"the hub sends more of {self._place.file} than the {self._size_bytes:,} bytes that it announces, so "
                "nothing of it is kept; get it again"
            )
        free = shutil.disk_usage(self._place.part.parent).free - self._spare_bytes
        if len(block) > free:
            raise OutputError(
                f"the disk of {self._place.part.parent} is full, of which {memory_text(self._spare_bytes)} stay free; "
                "free some space, and get it again to continue"
            )
        written = self._file.write(block)
        self._file.flush()  # kept if the process is killed
        self._report(self._file.tell())
        return written


def _verify(file: HubFile, facts: HubFacts, report: Callable[..., None]) -> None:
    """Give the part its name if it is what the hub describes, else delete it."""
    digest = hashlib.sha256() if len(facts.digest) == 64 else hashlib.sha1(b"blob %d\0" % facts.size_bytes)
    with file.part.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
            report(facts.size_bytes, is_checking=True)
    if digest.hexdigest() != facts.digest:
        file.part.unlink()
        kind = "SHA-256" if len(facts.digest) == 64 else "SHA-1"
        raise HubError(
            f"what arrived of {file.path.name} is not what the hub describes (its {kind} differs), so it was deleted; "
            "get it again"
        )
    try:
        file.part.rename(file.path)
    except OSError as error:
        raise OutputError(f"{file.path} cannot be written ({error.strerror}); check its folder") from error


_MOST_RESTARTS = 5
_BLOCK = 8 * 2**20
_RECENT_S = 5.0


class _Rate:
    """Bytes per second of the last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sizes: deque[tuple[float, int]] = deque()

    def after(self, size: int) -> float:
        now = self._clock()
        if self._sizes and size < self._sizes[-1][1]:  # the server began again
            self._sizes.clear()
        self._sizes.append((now, size))
        while len(self._sizes) > 2 and now - self._sizes[0][0] > _RECENT_S:
            self._sizes.popleft()
        since, first = self._sizes[0]
        return (size - first) / (now - since) if now > since else 0.0


def hub_constants() -> Any:
    """huggingface_hub's constants. Its telemetry is off: it would look up what program it is used by."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    return constants


def hub_token() -> str | bool:
    """The token of the login; False for none."""
    from huggingface_hub import get_token

    return get_token() or False


@contextlib.contextmanager
def _explained(file: HubFile) -> Iterator[None]:
    """Errors of the hub and of the connection become sentences."""
    constants = hub_constants()
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    page, by_hand = f"{constants.ENDPOINT}/{file.repository}", f"put {file.path.name} into {file.path.parent} yourself"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError(f"HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or {by_hand}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            has_token = bool(hub_token())
            how = "with the account of your token" if has_token else "and store an access token"
            raise GatedError(
                f"the hub asks for the licence of {file.repository} to be accepted; do so at {page}, {how}",
                accept=page,
                has_token=has_token,
            ) from error
        if status == 404:
            raise HubError(f"{page} does not have {file.file} any more; look for it there, and {by_hand}") from error
        raise HubError(f"the hub answers with an error ({status}); try again later, or {by_hand}") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise OutputError(f"{file.part} cannot be written ({error.strerror}); check its folder") from error
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise OutputError(f"{file.part} cannot be written ({error.strerror}); check the disk") from error
        if not file.kept_bytes:
            raise NoNetworkError([file]) from error
        raise HubError(
            f"no internet just now, or the connection broke; {memory_text(file.kept_bytes)} are kept, so get it again "
            "to continue"
        ) from error


def main() -> None:
    """Download what the first message names, and report to the parent until it closes the channel."""
    channel = channel_of_child()
    started = channel.receive()
    if started is None:
        return
    start, _ = started
    files = [HubFile(entry["repository"], entry["file"], Path(entry["path"])) for entry in start["files"]]
    cancelled, ended = threading.Event(), threading.Event()

    def listen() -> None:
        with contextlib.suppress(Exception):
            while channel.receive() is not None:
                pass
        cancelled.set()

    latest: list[Progress] = []  # what is not sent yet: at most the last one

    def send() -> None:
        with contextlib.suppress(OSError):  # the parent has exited
            channel.send({"type": "progress", **vars(latest.pop())} if latest else {"type": "beat"})

    def report_regularly() -> None:
        while not ended.wait(_REPORT_S):
            send()

    def report(progress: Progress) -> None:
        latest[:] = [progress]

    def run() -> Mapping[str, Any]:
        download(files, on_progress=report, cancelled=cancelled, spare_bytes=start["spare_bytes"])
        return {}

    for work in (listen, report_regularly):
        threading.Thread(target=work, daemon=True).start()
    end = how_it_ended(run, job="download", log=start["log"])
    ended.set()
    send()
    with contextlib.suppress(OSError):  # the parent has exited
        channel.send({"type": "ended", **end})
    os._exit(0)  # the normal exit would wait for connections


_REPORT_S = 0.25

if __name__ == "__main__":
    main()
