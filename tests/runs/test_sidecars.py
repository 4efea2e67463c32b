from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families import known  # noqa: F401  (its families register themselves)
from lorasmith.families.base import FAMILIES
from lorasmith.families.model import Model
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.metadata import sha256_file
from lorasmith.runs.library import train
from lorasmith.runs.run import Host, run
from lorasmith.runs.sidecars import write_sidecars
from tests.runs.folder_cases import planned

HEADER = {
    "modelspec.trigger_phrase": "sks <dog>, a",
    "ss_sd_model_name": "v1-5 & co",
    "ss_steps": "1200",
    "lorasmith.algorithm": "lora",
}


def written(folder: Path, family: str, header: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    lora = folder / "my.dog.safetensors"
    write_safetensors(lora, {"a": torch.ones(3)}, header)
    civitai, user = write_sidecars(lora, FAMILIES[family])
    assert (civitai.name, user.name) == ("my.dog.civitai.info", "my.dog.json")
    return json.loads(civitai.read_text("ascii")), json.loads(user.read_text("ascii"))


def test_both_files_have_what_their_readers_look_for(tmp_path: Path) -> None:
    civitai, user = written(tmp_path, "sd1", HEADER)
    sha256 = sha256_file(tmp_path / "my.dog.safetensors").upper()
    assert civitai["trainedWords"] == ["sks <dog>, a"] and civitai["baseModel"] == "SD 1.5"
    assert civitai["model"] == {"name": "my.dog", "type": "LORA"}
    (file,) = civitai["files"]
    assert file["primary"] and file["name"] == "my.dog.safetensors"
    assert (file["hashes"]["SHA256"], file["hashes"]["AutoV2"]) == (sha256, sha256[:10])
    assert "v1-5 &amp; co" in civitai["description"], "it is shown as HTML"
    assert not {"id", "modelId", "downloadUrl"} & civitai.keys(), "Civitai gives these"
    assert user == {
        "description": "For Stable Diffusion 1.x, trained on v1-5 & co in 1,200 steps with Lorasmith.",
        "sd version": "SD1",
        "activation text": "sks <dog>, a",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "",
    }


@pytest.mark.parametrize(
    "family, base, version",
    [("sdxl", "SDXL 1.0", "SDXL"), ("flux", "Flux.1 D", "Flux"), ("z-image", "Z-Image", "Unknown")],
)
def test_a_family_without_one_name_there_has_its_own(tmp_path: Path, family: str, base: str, version: str) -> None:
    civitai, user = written(tmp_path, family, {"ss_network_module": "lycoris.kohya"})
    assert (civitai["baseModel"], user["sd version"], civitai["model"]["type"]) == (base, version, "LoCon")
    assert civitai["trainedWords"] == [] and user["activation text"] == ""


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("private", [False, True])
def test_a_run_writes_them_on_request_and_a_private_one_no_more_than_its_lora_has(
    images: Path, tmp_path: Path, private: bool
) -> None:
    settings = {"steps": 1, "trigger": "sks", "sidecars": True, "previews": "a secret prompt", "preview_steps": 1}
    result = run(planned(images, tmp_path / "run", private=private, **settings), Host())
    assert result.path is not None
    text = result.path.with_name("cat.civitai.info").read_text() + result.path.with_name("cat.json").read_text()
    assert sha256_file(result.path).upper() in text, "the picture is in the header by then"
    assert '"activation text": "sks"' in text
    assert "secret" not in text and str(images) not in text


def test_a_run_writes_none_unasked(whole: Path) -> None:
    assert not {"cat.json", "cat.civitai.info", "samples"} & {path.name for path in whole.iterdir()}


def test_sidecars_need_a_folder_and_do_not_replace_the_record(tiny: Model, tmp_path: Path) -> None:
    data = EncodedDataset((Sample(torch.zeros(4, 8, 8), tiny.text_encoder.encode("a cat"), "1.png"),))
    with pytest.raises(OptionError, match="sidecars need a folder of the run, got no output"):
        train(tiny, data, steps=1, sidecars=True, progress=False)
    with pytest.raises(OptionError, match=r"would replace the run's own run\.json; give the LoRA another name"):
        train(tiny, data, steps=1, sidecars=True, progress=False, output=tmp_path / "a", title="Run")
    assert list(tmp_path.iterdir()) == []
