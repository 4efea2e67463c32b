"""Runs that are mirrored to a store, here a folder behind s3://bucket."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.runs.mirrored import fetched, output_for, uploaded
from lorasmith.runs.reproduce import plan_again
from lorasmith.runs.run import Host, run
from lorasmith.training.events import Event, StateSaved, Warned
from lorasmith.training.storage import run_mirror
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.storage.run_mirror import RunMirror, upload
from tests.hosts import Audience
from tests.runs.folder_cases import CONFIRMED, planned, tensors_of

_REGISTRY: Any = sys.modules["fsspec.registry"]  # the package has a mapping of this name
URL = "s3://bucket/cat"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is behind s3://bucket; the current folder is an empty one beside it."""

    class Store(LocalFileSystem):  # type: ignore[misc]
        protocol = "s3"
        cachable = False

        def __init__(self, **options: Any) -> None:
            super().__init__(auto_mkdir=True)

        @classmethod
        def _strip_protocol(cls, path: str) -> Any:
            return super()._strip_protocol(str(path).replace("s3://bucket", str(tmp_path / "bucket")))

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(_REGISTRY._registry, "s3", Store)
    return tmp_path / "bucket"


def sentences(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned) and "mirror" in event.message]


def copied(folder: Path, name: str) -> RunFolder:
    return RunFolder(Path(shutil.copytree(folder, name)))


def manifest_of(bucket: Path) -> Any:
    return json.loads((bucket / "cat" / "manifest.json").read_text())


def test_a_run_continues_from_its_mirror_to_the_bit_where_nothing_else_of_it_is(
    bucket: Path, images: Path, whole: Path
) -> None:
    first = Audience(stop_at=2)
    first.mirror = URL
    run(planned(images, Path("run")), first)
    assert sentences(first.events) == []
    shutil.rmtree("run")
    again = Audience()
    again.mirror = URL
    assert fetched(URL, again) == (Path("runs/cat"), False)
    run(plan_again(Path("runs/cat"), again, CONFIRMED), again)
    assert "Resumed" in again.names()
    assert tensors_of(Path("runs/cat")) == tensors_of(whole)
    shutil.rmtree("runs")
    assert fetched(URL, again) == (Path("runs/cat"), True)
    assert tensors_of(Path("runs/cat")) == tensors_of(whole)
    named = {file["object"] for file in manifest_of(bucket)["files"].values()} | {"manifest.json"}
    assert {path.relative_to(bucket / "cat").as_posix() for path in bucket.rglob("*") if path.is_file()} == named


def test_an_upload_that_breaks_off_leaves_the_state_before(
    bucket: Path, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(URL, copied(stopped, "run"))
    before = manifest_of(bucket)
    put = LocalFileSystem.put_file

    def full(self: Any, local: str, remote: str, **options: Any) -> None:
        if remote.endswith("step-000005.safetensors"):
            raise OSError("QuotaExceeded")
        put(self, local, remote, **options)

    with monkeypatch.context() as patched:
        patched.setattr(fsspec.get_filesystem_class("s3"), "put_file", full)
        with pytest.raises(OutputError, match=r"s3://bucket/cat cannot be used \(QuotaExceeded\)"):
            upload(URL, copied(whole, "longer"))
    assert manifest_of(bucket) == before
    shutil.rmtree("run")
    assert fetched(URL, Host()) == (Path("runs/cat"), False)
    assert RunFolder(Path("runs/cat")).states().paths()[0].name == "step-000002.safetensors"
    assert uploaded(Path("longer"), URL) and manifest_of(bucket)["step"] == 5


def test_a_store_that_fails_is_said_once_and_tried_again(
    bucket: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_mirror, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(run_mirror, "_AT_END_S", 0.05)
    store, events = fsspec.get_filesystem_class("s3"), list[Event]()

    def dead(self: Any, path: str, **options: Any) -> None:
        raise OSError("The provided token has expired")

    with monkeypatch.context() as patched:
        patched.setattr(store, "info", dead)
        mirror = RunMirror(URL, copied(stopped, "run"), events.append)
        for step in (1, 2):
            mirror(StateSaved(step=step, path=""))
        mirror.finish()
    assert [sentence.partition(":")[0] for sentence in sentences(events)][:1] == ["The run is not mirrored"]
    assert len(sentences(events)) == 2 and "resume run --mirror s3://bucket/cat when it" in sentences(events)[1]
    mirror = RunMirror(URL, RunFolder(Path("run")), events.append)
    mirror.finish()
    assert len(sentences(events)) == 2 and manifest_of(bucket)["step"] == 2


def test_a_mirror_is_of_one_run_and_has_one_writer(bucket: Path, stopped: Path, images: Path) -> None:
    events = list[Event]()
    mirror = RunMirror(URL, copied(stopped, "run"), events.append)
    mirror(StateSaved(step=2, path=""))
    while not (bucket / "cat" / "manifest.json").exists():
        pass
    upload(URL, copied(stopped, "other"))
    mirror.finish()
    assert ["another process writes to s3://bucket/cat" in sentence for sentence in sentences(events)] == [True]
    run(planned(images, Path("differs"), seed=1), Host())
    with pytest.raises(OutputError, match="holds another run; name another mirror"):
        upload(URL, RunFolder(Path("differs")))


@pytest.mark.parametrize("name", ["../out.json", "/out.json", "a/../../out.json", ".lock", "states/.x", "C:\\out.json"])
def test_a_manifest_of_others_writes_nowhere_else(bucket: Path, stopped: Path, name: str) -> None:
    upload(URL, copied(stopped, "run"))
    manifest = manifest_of(bucket)
    manifest["files"][name] = {**manifest["files"]["run.json"], "object": name}
    (bucket / "cat" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match=r"no name here|in a way that no run does"):
        fetched(URL, Host())
    assert not Path("runs").exists()


def test_bytes_that_were_changed_are_refused(bucket: Path, stopped: Path) -> None:
    upload(URL, copied(stopped, "run"))
    (bucket / "cat" / "run.json").write_text("{}")
    with pytest.raises(OutputError, match=r"run\.json at s3://bucket/cat has not the bytes that were uploaded"):
        fetched(URL, Host())
    with pytest.raises(OutputError, match="holds no run"):
        fetched("s3://bucket/none", Host())


def test_the_folder_of_a_mirrored_run_is_named_after_its_url() -> None:
    assert output_for("s3://bucket/runs/cat") == str(Path("runs/cat"))
    assert output_for("s3://bucket/runs/") is None
    for url in (
        "s3://bucket",
        "https://host/cat",
        "s3:///cat",
        "s3://bucket/../cat",
        "s3://bucket/cat?x=1",
        "runs/cat",
    ):
        with pytest.raises(OptionError):
            output_for(url)
