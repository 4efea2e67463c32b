"""A Ray cluster as the place of workers: its address, and what is checked before jobs go there.

`python -m lorasmith.runs.ray_cluster ADDRESS FOLDER` prints what it found as JSON, so that a server imports no Ray: the
number of workers that there is room for, or a sentence. What runs on the other machines is sent to them by value, as
they may have another version of lorasmith, or none.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.files import ensure_folder, locked
from lorasmith.core.printable import one_line_of, printable

_CHECK_S = 120.0
_CONNECT_S = 10.0
_COMPARED = ("lorasmith", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class RayPlaces:
    """Where workers run: `ray://HOST:PORT`, `HOST:PORT` or `auto`; by `?cpus=N&workers=M` how many cores each has in
    place of a GPU, and how many there are, 0 for as many as there is room for.
    """

    address: str
    cpus: int = 0
    workers: int = 0

    @classmethod
    def parse(cls, text: str) -> RayPlaces:
        """Raises OptionError."""
        plain, _, query = text.partition("?")
        try:
            parts = _address_parts(plain)
            values = {name: int(value) for name, (value,) in parse_qs(query, strict_parsing=bool(query)).items()}
            fits = parts.scheme == "ray" and bool(parts.hostname) and not parts.path and parts.username is None
            if not fits or (plain != "auto" and parts.port is None):
                raise ValueError
            if not values.keys() <= {"cpus", "workers"} or not all(1 <= value <= 10_000 for value in values.values()):
                raise ValueError
        except ValueError as error:
            raise OptionError(
                f"--workers must be ray://HOST:PORT, HOST:PORT or auto, with ?cpus=N&workers=M where wanted, got "
                f"{printable(text, limit=100)}; correct it"
            ) from error
        return cls(plain, **values)

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"num_cpus": self.cpus, "num_gpus": 0} if self.cpus else {"num_cpus": 0, "num_gpus": 1}


def _address_parts(address: str) -> SplitResult:
    return urlsplit(address if "://" in address else f"ray://{address}")


def bridge_command(text: str) -> tuple[str, ...]:
    """The command of a worker on a cluster, which `runs/ray_bridge.py` carries out."""
    return sys.executable, "-P", "-m", "lorasmith.runs.ray_bridge", text


def devices_on(text: str, folder: Path) -> list[dict[str, Any]]:
    """The devices of a cluster, `name` and `title` each, after all checks, in a process of its own. All machines must
    share `folder`. Raises OptionError for an address, and LorasmithError for a cluster, that jobs cannot be sent to.
    """
    RayPlaces.parse(text)
    command = [sys.executable, "-P", "-m", "lorasmith.runs.ray_cluster", text, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = printable((done.stderr.strip().splitlines() or ["it said nothing"])[-1], limit=300)
        raise LorasmithError(f"the Ray cluster at {text} cannot be checked: {last}; see its logs") from None
    if error := found.get("error"):
        raise LorasmithError(error)
    return [{"name": f"ray-{number}", "title": f"Ray worker {number}"} for number in range(found["workers"])]


@contextlib.contextmanager
def connected(places: RayPlaces) -> Any:
    """Ray, connected to the cluster. Raises OptionError."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise OptionError(
            'workers on a Ray cluster need the package ray; install it with pip install "ray[client]"'
        ) from error
    if places.address != "auto":
        parts = _address_parts(places.address)
        try:  # Ray itself would wait for minutes
            socket.create_connection((str(parts.hostname), parts.port or 0), timeout=_CONNECT_S).close()
        except OSError as error:
            raise OptionError(
                f"no Ray cluster answers at {places.address} ({error}); start one, or correct --workers"
            ) from error
    os.environ.pop("RAY_ADDRESS", None)  # which Ray reads for `auto`, and does not know with ?cpus=N
    try:
        ray.init(address=places.address, log_to_driver=False, logging_level="ERROR", namespace="lorasmith")
    except Exception as error:  # several kinds, by version
        text = printable(one_line_of(error), limit=300)
        if "ersion mismatch" in text or "same version" in text:
            trouble = f"Ray or Python differ between this machine and the cluster ({text}); make them equal"
        else:
            trouble = f"no Ray cluster answers at {places.address} ({text}); start one, or correct --workers"
        raise OptionError(trouble) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def versions() -> dict[str, str]:
    """What is compared between machines, without importing it."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in _COMPARED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def version_fault(node: str, ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """A sentence on what differs on a machine; empty if nothing does."""
    other = [
        f"{name} {theirs.get(name, 'none')} in place of {version}"
        for name, version in ours.items()
        if theirs.get(name, "none") != version
    ]
    return f"{node} has {', '.join(other)}; install the same versions on each machine" if other else ""


def folder_fault(node: str, folder: Path, secret: str, seen: Mapping[str, Any], written: Sequence[str]) -> str:
    """A sentence on a folder that a machine does not share; empty if it does. `written` are the files that are here."""
    if seen.get("secret") != secret or seen["file"] not in written:
        return (
            f"{node} does not share the folder {folder} ({seen.get('fault') or 'files do not arrive'}); mount one "
            "file system there on each machine"
        )
    if seen["got_lock"]:
        return (
            f"locks of {folder} do not reach {node}, so that two machines could write one run; mount it with locks, "
            "such as NFS 4 without nolock"
        )
    return ""


def check(places: RayPlaces, shared: Path) -> int:
    """The number of workers that there is room for, after the checks of each machine, which must share a folder. Raises
    LorasmithError.
    """
    with connected(places) as ray:
        alive = [node for node in ray.nodes() if node["Alive"]]
        asked = "GPU" if not places.cpus else "CPU"
        room = [node for node in alive if node["Resources"].get(asked, 0) >= (places.cpus or 1)]
        if not room:
            remedy = "add ?cpus=N to --workers to train on N cores of a machine" if not places.cpus else "lower cpus"
            raise OptionError(
                f"no machine of the Ray cluster at {places.address} has {places.cpus or 'a'} {asked}"
                f"{'s' if places.cpus > 1 else ''}, of {len(alive)} machines; {remedy}"
            )
        folder, secret = shared / "shared-check", secrets.token_hex(8)
        ensure_folder(folder)
        (folder / "secret").write_text(secret)
        with locked(folder / "lock", "the check of the shared folder runs already"):
            pinned = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
            look = ray.remote(num_cpus=0, max_retries=0)(_look)
            answers = {
                node["NodeManagerHostname"] + " " + node["NodeID"][:6]: look.options(
                    scheduling_strategy=pinned(node_id=node["NodeID"], soft=False)
                ).remote(str(folder), node["NodeID"], list(_COMPARED))
                for node in room
            }
            try:
                seen = dict(zip(answers, ray.get(list(answers.values()), timeout=_CHECK_S), strict=True))
            except Exception as error:  # several kinds, by version
                text = printable(one_line_of(error), limit=300)
                raise LorasmithError(
                    f"a machine of the Ray cluster cannot be checked ({text}); see its logs"
                ) from error
        written = [file.name for file in folder.iterdir()]
        faults = [
            version_fault(name, versions(), answer["versions"]) or folder_fault(name, shared, secret, answer, written)
            for name, answer in seen.items()
        ]
        for file in folder.iterdir():
            file.unlink(missing_ok=True)
        if fault := next(filter(None, faults), ""):
            raise LorasmithError(fault)
        places_there = sum(int(node["Resources"][asked] // (places.cpus or 1)) for node in room)
        return places.workers or places_there


def _look(folder: str, node: str, names: list[str]) -> dict[str, Any]:
    """On another machine: what it has, reads and may lock. Self-contained, as lorasmith may be missing there."""
    import os
    import sys
    from importlib import metadata

    versions = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    answer: dict[str, Any] = {"versions": versions, "file": f"node-{node}", "got_lock": False}
    try:
        with open(os.path.join(folder, "secret")) as file:  # noqa: PTH118, PTH123
            answer["secret"] = file.read()
        with open(os.path.join(folder, answer["file"]), "w") as file:  # noqa: PTH118, PTH123
            file.write(node)
        with open(os.path.join(folder, "lock"), "a") as file:  # noqa: PTH118, PTH123
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                answer["got_lock"] = True
            except (OSError, ImportError):
                pass
    except OSError as error:
        answer["fault"] = str(error)
    return answer


def main() -> None:
    """Print `{"workers"}` or `{"error"}`."""
    out = os.dup(1)
    os.dup2(2, 1)  # Ray prints to stdout
    try:
        answer: dict[str, Any] = {"workers": check(RayPlaces.parse(sys.argv[1]), Path(sys.argv[2]))}
    except LorasmithError as error:
        answer = {"error": str(error)}
    with os.fdopen(out, "w") as file:
        file.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
