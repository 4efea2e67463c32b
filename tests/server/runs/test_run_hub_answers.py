"""The folder that a LoRA of a run is shared with: its list, its ZIP file, and its upload to a hub on the loopback."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.folders import Folders
from lorasmith.runs.hub_download import HubError
from lorasmith.server.datasets.dataset_folders import UnknownFileError
from lorasmith.server.questions import answer, load_questions
from lorasmith.server.runs import run_hub_answers
from lorasmith.server.runs.run_hub_answers import hub_folder_files, upload_hub_folder, write_hub_folder
from lorasmith.server.runs.run_shapes import HubFolderBody
from tests.fake_hub import FakeHub, hub_with_login
from tests.server.api_server import AT, Client, api, made_up

RUN = "runs/dog-001"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the hub's client


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with hub_with_login(monkeypatch) as found:
        yield found


def test_what_leaves_is_listed_and_captions_only_if_asked(installation: Folders, base: Path) -> None:
    found = write_hub_folder(installation, RUN)
    place = base / RUN / "hub"
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {one.path for one in found.files} == files and found.files[0].path == "README.md"
    assert {"dog.safetensors", "dog.png", "images/1.webp"} <= files and not any("training" in one for one in files)
    assert found.told == {} and found.trigger == "sks dog" and found.pictures == 1 and found.licence == ""
    assert "'dog', weight_name" not in (place / "README.md").read_text(), "the built-in model is not diffusers'"
    more = write_hub_folder(
        installation,
        RUN,
        step=2,
        base_model="someone/tuned",
        licence="mit",
        private_captions=False,
        with_training_pictures=True,
    )
    assert "lorasmith.run" in more.told and max(map(len, more.told.values())) <= 300
    assert (more.base_models, more.licence) == (("someone/tuned",), "mit")
    assert any(one.path.startswith("training/") for one in more.files)
    assert not (base / RUN / "card").exists(), "the command's is left alone"


def test_there_is_nothing_to_download_before_and_no_link_is_followed(
    installation: Folders, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnknownFileError, match="has no folder for the hub yet"):
        hub_folder_files(installation, RUN)
    write_hub_folder(installation, RUN)
    place = base / RUN / "hub"
    secret = tmp_path / "secret"
    secret.write_text("x")
    (place / "secret").symlink_to(secret)
    assert "secret" not in hub_folder_files(installation, RUN)["files"]
    shutil.rmtree(place)
    place.symlink_to(tmp_path)
    with pytest.raises(OutputError, match="is a link to somewhere else"):
        write_hub_folder(installation, RUN)


def test_it_is_uploaded_to_a_private_repository_with_what_was_agreed_to(
    installation: Folders, base: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = write_hub_folder(installation, RUN, private_captions=False)
    assert listed.can_upload
    public = HubFolderBody(private_captions=False)
    with pytest.raises(OptionError, match=r"that were not listed \(.*lorasmith\.run"):
        upload_hub_folder(installation, RUN, repository="dog", folder=public)
    assert not hub.files and not hub.private
    load_questions()
    body = {"repository": "dog", "folder": {"private_captions": False}, "told": [*listed.told]}
    sent = answer("upload_hub_folder", {"id": RUN, **body}, installation)
    assert sent == {
        "repository": "somebody/dog", "address": f"{hub.address}/somebody/dog", "is_private": True
    }  # fmt: skip
    assert {one.path for one in listed.files} == {path.removeprefix("somebody/dog/") for path in hub.files}
    monkeypatch.setattr("lorasmith.runs.hub_upload.hub_token", lambda: False)
    monkeypatch.setattr(run_hub_answers, "hub_token", lambda: False)
    assert not write_hub_folder(installation, RUN).can_upload
    with pytest.raises(HubError, match="run: hf auth login"):
        upload_hub_folder(installation, RUN, repository="dog", folder=HubFolderBody())


async def test_it_is_downloaded_as_one_file_and_uploaded_by_pages_of_this_machine_alone(
    client: Client, tmp_path: Path
) -> None:
    large = bytes(range(256)) * 8192
    (tmp_path / "one").write_bytes(large)
    (tmp_path / "two").write_bytes(b"# dog")
    files = {"dog.safetensors": str(tmp_path / "one"), "README.md": str(tmp_path / "two")}
    made_up(client).update(
        hub_folder_files={"title": "dög", "files": files},
        write_hub_folder={"can_upload": True},
        upload_hub_folder={"is_private": True},
    )
    async with client.http.get(f"{AT}/runs/runs%2Fdog-001/hub-folder") as response:
        assert response.content_type == "application/zip"
        assert response.headers["Content-Disposition"].endswith("filename*=UTF-8''d%C3%B6g.zip")
        with zipfile.ZipFile(io.BytesIO(await response.read())) as sent:
            assert sent.testzip() is None and sent.namelist() == ["dög/dog.safetensors", "dög/README.md"]
            assert sent.read("dög/dog.safetensors") == large
    body = {"repository": "dog", "folder": {}}
    assert (await client.ask("POST", "/runs/runs%2Fdog-001/hub-folder"))["can_upload"]
    assert await client.ask("POST", "/runs/runs%2Fdog-001/hub-upload", body) == {"is_private": True}
    async with api(tmp_path / "other", host="0.0.0.0", token="t" * 12) as other:
        made_up(other)["write_hub_folder"] = {"can_upload": True}
        assert not (await other.ask("POST", "/runs/runs%2Fdog-001/hub-folder"))["can_upload"]
        assert "download the folder" in await other.error("POST", "/runs/runs%2Fdog-001/hub-upload", body)
