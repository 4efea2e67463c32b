"""Uploads to a hub on the loopback: private, continued, and refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorasmith.cli.main import app
from lorasmith.core.errors import OptionError
from lorasmith.runs.hub_download import HubError
from lorasmith.runs.hub_upload import named_repository, upload_card
from tests.fake_hub import FakeHub, hub_with_login
from tests.runs.test_model_card import kohya_file

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the hub's client


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with hub_with_login(monkeypatch) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\ntags:\n- lora\n---\n\n# dog\n")
    (tmp_path / "dog.safetensors").write_bytes(b"tensors" * 100)
    return tmp_path


def test_a_folder_is_uploaded_to_a_private_repository_and_again_without_its_large_files(
    served: FakeHub, folder: Path
) -> None:
    repository = named_repository("dog")
    assert repository == "somebody/dog"
    done = upload_card(folder, repository)
    assert done.is_private and done.address == f"{served.address}/somebody/dog"
    assert served.private == {"somebody/dog": True}
    assert {path: served.files[path] for path in served.files} == {
        f"somebody/dog/{path.name}": path.read_bytes() for path in folder.iterdir()
    }
    served.requests.clear()
    assert upload_card(folder, repository).is_private
    assert "PUT" not in {method for method, *_ in served.requests}


def test_an_upload_that_broke_continues(served: FakeHub, folder: Path) -> None:
    served.refuses_uploads = 400
    with pytest.raises(HubError, match="run the command again to continue"):
        upload_card(folder, "somebody/dog")
    assert upload_card(folder, "somebody/dog", public=True).is_private, "it was made private"
    assert len(served.files) == 2


def test_what_cannot_be_uploaded_is_refused(served: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="must be owner/name of letters"):
        named_repository("a/b/c")
    served.files["somebody/cat/cat.safetensors"] = b"cat"
    with pytest.raises(HubError, match=r"exists with other files, such as cat\.safetensors; choose another name"):
        upload_card(folder, "somebody/cat")
    served.files["somebody/dog/README.md"] = b"dog"
    with pytest.raises(HubError, match="somebody/dog exists and is public; add --public"):
        upload_card(folder, "somebody/dog")
    assert not upload_card(folder, "somebody/dog", public=True).is_private
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    with pytest.raises(HubError, match="does not know your token; run: hf auth login"):
        named_repository("dog")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("lorasmith.runs.hub_upload.hub_token", lambda: False)
    with pytest.raises(HubError, match=r"needs a login at .*; run: hf auth login"):
        named_repository("dog")


def test_the_command_uploads_no_captions_unasked(served: FakeHub, tmp_path: Path) -> None:
    path = str(kohya_file(tmp_path))
    asked = CliRunner().invoke(app, ["card", path, "--push-to-hub", "dog"])
    assert asked.exit_code == 1 and "add --private-captions" in " ".join(asked.output.split())
    assert not served.files
    sent = CliRunner().invoke(app, ["card", path, "--push-to-hub", "dog", "--private-captions", "--overwrite"])
    assert sent.exit_code == 0, sent.output
    assert "load_lora_weights('somebody/dog'" in served.files["somebody/dog/README.md"].decode()
    assert b"jane" not in b"".join(served.files.values())
