"""A hub of models on the loopback: its answers about files, their bytes, and everything that can go wrong with both."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

TOKEN = "hf_" + "x" * 34


@dataclass
class FakeHub:
    """What a hub has, and how it behaves.

    Attributes:
        files: contents by `owner/name/path`.
        refused: status of the answers about a repository.
        gated: repositories that only requests with the token may read.
        cut_after: bytes after which each of the next connections breaks, one after another.
        corrupted: whether the first byte that is sent of a file is another one.
        ignores_ranges: whether it sends whole files to requests for their rest.
        sends: what is sent of each file, again and again without an end, in place of its content.
        redirects: places where the contents are, which requests are sent on to.
        size: that of each file by the answers about it, in place of its own.
        in_git: files that are small enough for git itself, whose digest is that of git's object.
        gate: bytes from `held_after` on are sent while this is set.
        held_after: place in a file.
        private: repositories that were made, and whether each is private.
        stored: uploaded large files by digest, which are sent once.
        refuses_uploads: status of the next answer to a large file; 0 takes it.
        requests: method, path, first byte of the wanted range, and token of each.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut_after: list[int] = field(default_factory=list)
    corrupted: bool = False
    ignores_ranges: bool = False
    sends: bytes = b""
    redirects: str = ""
    size: str = ""
    in_git: set[str] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)
    held_after: int = 0
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    refuses_uploads: int = 0
    requests: list[tuple[str, str, int, str]] = field(default_factory=list)
    address: str = ""

    @property
    def bytes_asked(self) -> list[int]:
        """First byte of each request for a content."""
        return [first for method, _, first, _ in self.requests if method == "GET"]


@contextmanager
def hub(files: Mapping[str, bytes]) -> Iterator[FakeHub]:
    """A hub that has these files by `owner/name/path`."""
    found = FakeHub(dict(files))
    found.gate.set()

    class Handler(_Handler):
        state = found

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found
    finally:
        found.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_with_login(patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub, which huggingface_hub uses with the account `somebody`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub({}) as found:
        patch.setattr(constants, "ENDPOINT", found.address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        yield found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self._whoami()
        else:
            self._answer()

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.state.requests.append(("POST", self.path, 0, token))
        if token != TOKEN:
            return self._refuse(401)
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(sent)["content"].split("---\n")[1])
            return self._json({"warnings": [], "errors": []}, 200 if isinstance(front, dict) else 400)
        if path == "/api/repos/create":
            asked = json.loads(sent)
            repository = f"{asked['organization']}/{asked['name']}"
            is_private = asked.get("private", asked.get("visibility") == "private")
            self.state.private[repository] = is_private
            return self._json({"url": f"{self.state.address}/{repository}"})
        if path.endswith("/preupload/main"):
            modes = {".safetensors": "lfs", ".png": "lfs", ".webp": "lfs"}
            files = [one["path"] for one in json.loads(sent)["files"]]
            ways = {one: modes.get(one[one.rfind(".") :], "regular") for one in files}
            return self._json(
                {"files": [{"path": one, "uploadMode": way, "shouldIgnore": False} for one, way in ways.items()]}
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(sent)["objects"]
            for one in objects:
                if one["oid"] not in self.state.stored:
                    one["actions"] = {"upload": {"href": f"{self.state.address}/lfs/{one['oid']}"}}
            return self._json({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            repository = "/".join(path.split("/")[3:5])
            for line in map(json.loads, sent.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.state.files[f"{repository}/{value['path']}"] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.state.files[f"{repository}/{value['path']}"] = self.state.stored[value["oid"]]
            return self._json({"commitUrl": f"{self.state.address}/{repository}/commit/x", "commitOid": "c" * 40})
        return self._refuse(404)

    def do_PUT(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.state.requests.append(("PUT", self.path, 0, ""))
        if status := self.state.refuses_uploads:
            self.state.refuses_uploads = 0
            return self._refuse(status)
        assert hashlib.sha256(sent).hexdigest() == self.path.removeprefix("/lfs/")
        self.state.stored[self.path.removeprefix("/lfs/")] = sent
        return self._json({})

    def _json(self, answer: object, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.state.requests.append((self.command, self.path, first, token))
        if self.path.startswith("/api/models/"):
            return self._list(self.path.removeprefix("/api/models/"), token)
        if "/resolve/" not in self.path:
            return self._refuse(404)
        owner, name, _, _, *rest = self.path.strip("/").split("/")
        repository, content = f"{owner}/{name}", self.state.files.get("/".join((owner, name, *rest)))
        if (status := self.state.refused.get(repository)) is not None:
            return self._refuse(status)
        if repository in self.state.gated and token != TOKEN:
            return self._refuse(403 if token else 401, "GatedRepo")
        if content is None:
            return self._refuse(404, "EntryNotFound")
        if self.state.redirects and self.command == "GET":
            self.send_response(302)
            self.send_header("Location", self.state.redirects.format(path=self.path))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        first = 0 if self.state.ignores_ranges else first
        self.send_response(206 if first else 200)
        digest = hashlib.sha256(content).hexdigest()
        if self.state.sends and self.command == "GET":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", "c" * 40)
        if "/".join((owner, name, *rest)) in self.state.in_git:
            self.send_header("ETag", f'"{hashlib.sha1(b"blob %d" % len(content) + bytes(1) + content).hexdigest()}"')
        else:
            self.send_header("X-Linked-Size", self.state.size or str(len(content)))
            self.send_header("X-Linked-ETag", f'"{digest}"')
            self.send_header("ETag", '"x"')
        self.end_headers()
        if self.command == "GET":
            self._send(content, first)
        return None

    def _list(self, repository: str, token: str) -> None:
        """The files of a repository."""
        files = [path.removeprefix(f"{repository}/") for path in self.state.files if path.startswith(f"{repository}/")]
        is_there = bool(files) or repository in self.state.private
        if not is_there or (repository in self.state.gated and token != TOKEN):
            return self._refuse(401 if is_there else 404, "GatedRepo" if is_there else "RepoNotFound")
        private = self.state.private.get(repository, False)
        siblings = [{"rfilename": one} for one in files]
        content = json.dumps({"id": repository, "sha": "c" * 40, "private": private, "siblings": siblings})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())
        return None

    def _send(self, content: bytes, first: int) -> None:
        if self.state.sends:
            with suppress(OSError):  # until the client goes
                while True:
                    self.wfile.write(self.state.sends)
        if self.state.corrupted:
            content = bytes([content[0] ^ 1]) + content[1:]
        most = first + self.state.cut_after.pop(0) if self.state.cut_after else len(content)
        step = 64 * 1024
        try:
            for start in range(first, min(most, len(content)), step):
                if start + step > self.state.held_after:
                    self.state.gate.wait()
                self.wfile.write(content[start : min(start + step, most)])
        except OSError:  # the client has gone
            most = 0
        if most < len(content):
            self.close_connection = True

    def _refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _whoami(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401)
        content = json.dumps(
            {"name": "somebody", "type": "user", "auth": {"accessToken": {"displayName": "shelf", "role": "read"}}}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None
