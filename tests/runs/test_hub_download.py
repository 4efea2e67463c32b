"""Downloads from a hub on the loopback: whole, continued, refused, damaged, cancelled, without room or a network."""

from __future__ import annotations

import random
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorasmith.core.errors import CancelledError, OutputError
from lorasmith.runs import hub_download
from lorasmith.runs.hub_download import (
    GatedError,
    HubError,
    HubFile,
    NoNetworkError,
    Progress,
    download,
    facts_of,
    files_of,
    store_token,
)
from tests.fake_hub import TOKEN, FakeHub, hub

CONTENT = random.Random(0).randbytes(5000)
NAME = "maker/model/files/weights.safetensors"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    from huggingface_hub import file_download, hf_api

    with hub({NAME: CONTENT, "maker/model/small.safetensors": b"small"}) as found:
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_HOME"):
            monkeypatch.setattr(constants, name, found.address, raising=False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + template[template.index("/{") :])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.setattr(hf_api.api, "endpoint", found.address)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield found


@pytest.fixture
def wanted(tmp_path: Path) -> HubFile:
    return HubFile("maker/model", "files/weights.safetensors", tmp_path / "models" / "vae" / "weights.safetensors")


def test_files_are_downloaded_verified_and_named(served: FakeHub, wanted: HubFile) -> None:
    other = HubFile("maker/model", "small.safetensors", wanted.path.with_name("small.safetensors"))
    seen: list[Progress] = []
    download([wanted, other], on_progress=seen.append)
    assert wanted.path.read_bytes() == CONTENT and other.path.read_bytes() == b"small"
    assert sorted(one.name for one in wanted.path.parent.iterdir()) == ["small.safetensors", "weights.safetensors"]
    sizes = [one.done_bytes for one in seen]
    assert sizes == sorted(sizes) and sizes[-1] == seen[0].total_bytes == 5005
    assert {one.file for one in seen if one.is_checking} == {"weights.safetensors", "small.safetensors"}
    assert all("/resolve/" in path for _, path, _, _ in served.requests)  # nothing else is sent to the hub
    served.requests.clear()
    download([wanted, other])
    assert served.requests == []  # they are there


def test_the_files_of_a_captioner_are_listed_and_small_ones_verified(served: FakeHub, tmp_path: Path) -> None:
    served.files |= {
        f"maker/says/{name}": name.encode()
        for name in (
            "README.md",
            "a.py",
            "config.json",
            "model.safetensors",
            "onnx/a.json",
            "pytorch_model.bin",
            "vocab.txt",
        )
    }
    served.in_git = {"maker/says/config.json", "maker/says/vocab.txt"}
    files = files_of("maker/says", tmp_path / "says")
    assert [one.file for one in files] == [
        "model.safetensors",
        "vocab.txt",
        "config.json",
    ]  # which says that it is whole
    download(files)
    assert {one.name: one.read_text() for one in (tmp_path / "says").iterdir()} == {one.file: one.file for one in files}
    (tmp_path / "says" / "config.json").unlink()
    served.corrupted = True
    with pytest.raises(HubError, match=r"its SHA-1 differs\), so it was deleted"):
        download(files)
    assert not list((tmp_path / "says").glob("config.json*"))
    with pytest.raises(HubError, match="has no model in safetensors any more"):
        files_of("maker/model", tmp_path)
    with pytest.raises(HubError, match=r"does not have all files any more"):
        files_of("maker/none", tmp_path)


def test_a_broken_connection_is_continued(served: FakeHub, wanted: HubFile) -> None:
    served.cut_after = [1200, 700]
    download([wanted])
    assert wanted.path.read_bytes() == CONTENT
    assert served.bytes_asked == [0, 1000, 1500]  # whole pieces of 500 bytes had arrived


def test_a_later_download_continues_what_a_first_one_left(served: FakeHub, wanted: HubFile) -> None:
    served.cut_after = [900, *[0] * 20]
    with pytest.raises(HubError, match=r"the connection broke; .*kept, so get it again to continue"):
        download([wanted])
    assert not wanted.path.exists() and wanted.kept_bytes == 500
    served.cut_after = []
    served.requests.clear()
    seen: list[Progress] = []
    download([wanted], on_progress=seen.append)
    assert wanted.path.read_bytes() == CONTENT
    assert served.bytes_asked == [500] and seen[0].done_bytes == 500


def test_a_hub_that_cannot_continue_sends_all_again(served: FakeHub, wanted: HubFile) -> None:
    served.ignores_ranges = True
    served.cut_after = [1200]
    download([wanted])
    assert wanted.path.read_bytes() == CONTENT


def test_damaged_bytes_are_deleted_and_get_no_name(served: FakeHub, wanted: HubFile) -> None:
    served.corrupted = True
    with pytest.raises(HubError, match=r"its SHA-256 differs\), so it was deleted; get it again"):
        download([wanted])
    assert list(wanted.path.parent.iterdir()) == []
    served.corrupted = False
    download([wanted])
    assert wanted.path.read_bytes() == CONTENT


def test_a_part_of_another_file_is_found_out(served: FakeHub, wanted: HubFile) -> None:
    wanted.path.parent.mkdir(parents=True)
    wanted.part.write_bytes(b"of an older version")
    with pytest.raises(HubError, match="SHA-256 differs"):
        download([wanted])
    wanted.part.write_bytes(b"x" * 6000)  # longer than the file
    download([wanted])
    assert wanted.path.read_bytes() == CONTENT


def test_gated_files_say_where_to_accept_their_licence(served: FakeHub, wanted: HubFile) -> None:
    served.gated = {"maker/model"}
    page = f"{served.address}/maker/model"
    with pytest.raises(GatedError, match=f"to be accepted; do so at {page}, and store an access token") as caught:
        facts_of(wanted)
    assert caught.value.details == {"accept": page, "has_token": False}
    with pytest.raises(HubError, match=r"does not know this token; make one at .*/settings/tokens"):
        store_token("hf_" + "y" * 34)
    store_token(f" {TOKEN}\n")
    download([wanted])
    assert wanted.path.read_bytes() == CONTENT


def test_a_token_without_access_is_told_apart(
    served: FakeHub, wanted: HubFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.gated = {"maker/model"}
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    with pytest.raises(GatedError, match="with the account of your token") as caught:
        facts_of(wanted)
    assert caught.value.details["has_token"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "does not have files/weights.safetensors any more; look for it there, and put weights.safetensors into"),
        (503, r"answers with an error \(503\); try again later"),
    ],
)
def test_other_refusals_are_sentences(served: FakeHub, wanted: HubFile, status: int, message: str) -> None:
    served.refused = {"maker/model": status}
    with pytest.raises(HubError, match=message):
        download([wanted])


def test_without_a_network_or_with_it_forbidden(
    served: FakeHub, wanted: HubFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
        with monkeypatch.context() as context:
            context.setattr(
                constants,
                "HUGGINGFACE_CO_URL_TEMPLATE",
                constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(served.address, nowhere),
            )
            context.setattr(constants, "ENDPOINT", nowhere)
            other = HubFile("maker/other", "small.safetensors", wanted.path.with_name("small.safetensors"))
            with pytest.raises(
                NoNetworkError, match=r"^no internet just now, or .*; try again, or add the files "
            ) as none:
                download([wanted, other])
            folder = str(wanted.path.parent)
            assert none.value.details["files"] == [
                {"file": "files/weights.safetensors", "page": f"{nowhere}/maker/model", "folder": folder},
                {"file": "small.safetensors", "page": f"{nowhere}/maker/other", "folder": folder},
            ]
            with pytest.raises(NoNetworkError, match=f"yourself: all files of {nowhere}/maker/model into .*says$"):
                files_of("maker/model", wanted.path.with_name("says"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so nothing is downloaded; unset it"):
        download([wanted])


def test_nothing_is_downloaded_that_does_not_fit_the_disk(
    served: FakeHub, wanted: HubFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=6000))
    with pytest.raises(OutputError, match=r"must fit on the disk of .*; free some space"):
        download([wanted], spare_bytes=2000)
    assert served.bytes_asked == [] and not wanted.part.exists()
    wanted.part.parent.mkdir(parents=True)
    wanted.part.write_bytes(CONTENT[:1500])
    download([wanted], spare_bytes=2000)  # for what is here, no room is needed
    assert wanted.path.exists()


def test_cancelling_keeps_what_arrived(served: FakeHub, wanted: HubFile) -> None:
    cancelled = threading.Event()

    def stop(progress: Progress) -> None:
        if progress.done_bytes >= 2000:
            cancelled.set()

    with pytest.raises(CancelledError, match="get it again to continue"):
        download([wanted], on_progress=stop, cancelled=cancelled)
    assert 2000 <= wanted.kept_bytes < 5000
    download([wanted])
    assert wanted.path.read_bytes() == CONTENT


def test_the_speed_is_that_of_the_last_seconds() -> None:
    now = iter([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
    rate = hub_download._Rate(lambda: next(now))
    assert [round(rate.after(size)) for size in (0, 100, 200, 200, 700, 50)] == [0, 100, 100, 0, 500, 0]


def test_a_download_ends_where_the_hub_said(served: FakeHub, wanted: HubFile) -> None:
    served.sends = b"x" * 5000
    with pytest.raises(HubError, match=r"more of files/weights.safetensors than the 5,000 bytes that it announces"):
        download([wanted])
    assert not wanted.path.exists() and not wanted.kept_bytes
    served.sends = b""
    download([wanted])
    assert wanted.path.read_bytes() == CONTENT


def test_a_hub_that_begins_again_and_again_is_given_up(served: FakeHub, wanted: HubFile) -> None:
    served.ignores_ranges, served.cut_after = True, [1000] * 100
    with pytest.raises(HubError, match=r"begins files/weights.safetensors again after each broken connection"):
        download([wanted])
    assert len(served.bytes_asked) < 10


def test_the_disk_is_looked_at_while_it_fills(
    served: FakeHub, wanted: HubFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By others: the download alone had enough room."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=9000 - 2 * wanted.kept_bytes))
    with pytest.raises(OutputError, match=r"the disk of .* is full, of which .* stay free; free some space"):
        download([wanted], spare_bytes=1000)
    assert 0 < wanted.kept_bytes < 5000
    monkeypatch.undo()


@pytest.mark.parametrize("size", ["-5", "x", ""])
def test_a_size_that_is_none(served: FakeHub, wanted: HubFile, size: str) -> None:
    served.size = size or "5000"
    if not size:
        download([wanted])
        return
    with pytest.raises(HubError, match="names no size and digest of"):
        download([wanted])


def test_a_token_is_not_sent_on_to_another_host(
    served: FakeHub, wanted: HubFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub({NAME: CONTENT}) as other:
        served.redirects = other.address + "{path}"
        download([wanted])
        assert wanted.path.read_bytes() == CONTENT
        assert {token for *_, token in served.requests} == {TOKEN} and {token for *_, token in other.requests} == {""}


@pytest.mark.parametrize("place", ["{path}", "file:///etc/passwd", "http://[", "//"])
def test_a_redirect_that_leads_nowhere(
    served: FakeHub, wanted: HubFile, place: str, network_attempts: list[str]
) -> None:
    served.redirects = place
    with pytest.raises(HubError, match=r"try again|yourself|cannot be"):
        download([wanted])
    assert not wanted.path.exists() and not wanted.kept_bytes
    assert all("%5B" in attempt for attempt in network_attempts)  # which is the host of the third one
    network_attempts.clear()


def test_a_repository_of_more_files_than_a_model_has(served: FakeHub, tmp_path: Path) -> None:
    served.files |= {f"maker/many/{number}.json": b"" for number in range(600)}
    served.files |= {"maker/many/config.json": b"", "maker/many/a.safetensors": b""}
    with pytest.raises(HubError, match="has 602 files, and a model has 500 at most"):
        files_of("maker/many", tmp_path)
