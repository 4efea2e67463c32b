"""The folder of `lorasmith card`: what it says of LoRAs of three trainers, and what it keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.metadata import sha256_file
from lorasmith.runs.model_card import Card, write_card
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_log import read_run
from tests.runs.folder_cases import planned

BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
KOHYA = {
    "ss_sd_model_name": "v1-5-pruned-emaonly.safetensors",
    "ss_network_module": "networks.lora",
    "ss_steps": "1200",
    "ss_learning_rate": "0.0001",
    "ss_dataset_dirs": json.dumps({"10_jane doe": {"n_repeats": 10}}),
    "ss_tag_frequency": json.dumps({"10_jane doe": {"jane doe at home": 3}}),
}


def front(card: Card) -> tuple[dict[str, Any], str]:
    """The metadata, as the hub's own client reads it, and the text."""
    text = (card.folder / "README.md").read_text(encoding="utf-8")
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard(text)
    found = yaml.safe_load(text.split("---\n")[1])
    assert read.data.to_dict() == found
    return found, read.text


def kohya_file(folder: Path, **more: str) -> Path:
    path = folder / "dog.safetensors"
    tensors = {
        f"lora_unet_{BLOCK}.lora_down.weight": torch.ones(4, 768),
        f"lora_unet_{BLOCK}.lora_up.weight": torch.full((320, 4), 0.1),
        f"lora_unet_{BLOCK}.alpha": torch.tensor(4.0),
    }
    write_safetensors(path, tensors, {**KOHYA, **more})
    return path


def test_a_kohya_file_has_a_card_of_what_it_says_and_asks_for_the_rest(tmp_path: Path) -> None:
    path = kohya_file(tmp_path)
    card = write_card(path)
    assert card.folder == tmp_path / "dog-card"
    data, text = front(card)
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "creativeml-openrail-m",
        "diffusers",
        "text-to-image",
    )
    assert {"lora", "template:sd-lora"} <= {*data["tags"]} and "lorasmith" not in data["tags"]
    assert "instance_prompt" not in data and "widget" not in data
    assert [one.split(";")[0] for one in card.missing] == ["No trigger is known", "There are no pictures that it drew"]
    assert card.lora.read_bytes() == path.read_bytes(), "diffusers loads it as it is"
    assert "- Steps: 1,200" in text and "- Rank: 4" in text and "Trainer" not in text
    assert sha256_file(path) in text and "load_lora_weights('dog-card', weight_name='dog.safetensors'" in text
    assert "Lorasmith" not in (card.folder / "dog.civitai.info").read_text()
    assert {*card.told} == {"ss_dataset_dirs", "ss_tag_frequency"}


def test_private_captions_take_out_what_was_listed(tmp_path: Path) -> None:
    card = write_card(kohya_file(tmp_path), private_captions=True)
    assert card.told == {}
    everything = b"".join(path.read_bytes() for path in card.folder.rglob("*") if path.is_file())
    assert b"jane" not in everything and b"1200" in everything


@pytest.mark.parametrize("base", ["stabilityai/stable-diffusion-xl-base-1.0", "/home/jane/models/mine"])
def test_a_peft_folder_is_converted_and_its_configuration_names_the_base(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "dog-peft"
    folder.mkdir()
    module = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 2048), f"{module}.lora_B.weight": torch.full((640, 4), 0.1)}
    write_safetensors(folder / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    card = write_card(folder, trigger="sks dog")
    data, text = front(card)
    assert read_safetensors(card.lora)[0].keys() == {
        f"unet.{module.removeprefix('base_model.model.')}.lora_{side}.weight" for side in "AB"
    }
    assert data["instance_prompt"] == "sks dog" and "`sks dog`" in text
    assert "- Algorithm: LoRA\n- Rank: 4\n- Alpha: 8\n" in text, "as it was trained, not as it was converted"
    assert "into models/Lora. The prompt" in text, "there is no picture beside it"
    if base.startswith("/"):
        assert "base_model" not in data and "license" not in data and "jane" not in text
        assert "--base-model names it" in card.missing[0] and "--license" in card.missing[1]
    else:
        assert (data["base_model"], data["license"]) == (base, "openrail++")


def test_files_of_ai_toolkit_name_their_kind_of_model_and_their_trigger(tmp_path: Path) -> None:
    path = kohya_file(tmp_path)
    metadata = {
        "software": json.dumps({"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit"}),
        "training_info": json.dumps({"step": 2000, "epoch": 9}),
        "ss_base_model_version": "sd_1.5",
        "ss_tag_frequency": json.dumps({"1_ohwx man": {"ohwx man": 1}}),
    }
    write_safetensors(path, {key: one.clone() for key, one in read_safetensors(path)[0].items()}, metadata)
    card = write_card(path)
    data, text = front(card)
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert data["instance_prompt"] == "ohwx man"
    assert "- Steps: 2,000" in text and "- Trainer: ai-toolkit" in text
    assert card.missing[0].startswith("The file names its kind of model alone, sd_1.5, so stable-diffusion-v1-5/")
    chosen = write_card(path, base_model="someone/tuned", overwrite=True)
    assert chosen.base_models == ("someone/tuned",) and len(chosen.missing) == 2


def test_the_distilled_variant_comes_first_and_other_licences_are_named_with_a_link(tmp_path: Path) -> None:
    names = {"ss_sd_model_name": "krea2_raw_fp8_scaled.safetensors"}
    data, text = front(write_card(kohya_file(tmp_path, **names)))
    assert data["base_model"] == ["krea/Krea-2-Turbo", "krea/Krea-2-Raw"]
    assert data["license"] == "other"
    assert data["license_name"] == "krea-2-community-license"
    assert data["license_link"] == "https://huggingface.co/krea/Krea-2-Raw"
    assert "trained on krea/Krea-2-Raw" in text


def test_given_pictures_lose_what_their_files_say_but_prompt_and_seed(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a `dog` | <b>\nNegative prompt: cat\nSteps: 20, Seed: 42, Model: /home/jane/x")
    picture = tmp_path / "drawn.png"
    Image.new("RGB", (64, 48), "red").save(picture, pnginfo=info)
    card = write_card(kohya_file(tmp_path), pictures=[picture], base_model="someone/tuned")
    data, text = front(card)
    assert data["widget"] == [{"text": "a `dog` | <b>", "parameters": {"seed": 42}, "output": {"url": "images/1.webp"}}]
    assert data["base_model"] == "someone/tuned" and "license" not in data
    assert "`` a `dog` | <b> ``, seed 42" in text and "with its .png" in text
    for file in (card.folder / "images" / "1.webp", card.folder / "dog.png"):
        assert b"jane" not in file.read_bytes()


def test_metadata_of_strangers_is_text(tmp_path: Path) -> None:
    wild = "</script>\n---\nlicense: mit\n# [x](javascript:1) `"
    data, text = front(write_card(kohya_file(tmp_path, **{"modelspec.trigger_phrase": wild, "ss_optimizer": wild})))
    assert data["instance_prompt"] == " ".join(wild.split()) and data["license"] == "creativeml-openrail-m"
    assert "\nlicense" not in text and "- Optimizer: \\</script\\>" in text and "[x](" not in text.split("Optimizer")[1]


def test_only_a_card_is_replaced(tmp_path: Path) -> None:
    path = kohya_file(tmp_path)
    card = write_card(path)
    with pytest.raises(OutputError, match=r"dog-card exists already; .* add --overwrite"):
        write_card(path)
    assert write_card(path, overwrite=True).folder == card.folder
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(OutputError, match="is no card of a LoRA, and only a card is replaced"):
        write_card(path, other, overwrite=True)
    with pytest.raises(OptionError, match=r"must be an id of the hub, such as owner/name, got '/models/x'"):
        write_card(path, base_model="/models/x", overwrite=True)


@pytest.fixture(scope="module")
def previewed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a preview."""
    folder = tmp_path_factory.mktemp("previewed") / "run"
    run(planned(images, folder, steps=1, trigger="sks", previews="sks at sea", preview_steps=1), Host())
    return folder


def test_the_card_of_a_run_has_its_previews_and_nothing_of_its_photos(previewed: Path, tmp_path: Path) -> None:
    card = write_card(previewed, tmp_path / "card")
    data, text = front(card)
    assert data["instance_prompt"] == "sks" and "lorasmith" in data["tags"]
    assert "base_model" not in data and "`lorasmith-tiny`" in text
    assert [one["text"] for one in data["widget"]] == ["sks at sea"] and "parameters" in data["widget"][0]
    assert sorted(path.relative_to(card.folder).as_posix() for path in card.folder.rglob("*") if path.is_file()) == [
        "README.md", "cat.civitai.info", "cat.json", "cat.png", "cat.safetensors", "images/1.webp"
    ]  # fmt: skip
    assert f"source.folder: {read_run(previewed).record.source['folder']}" in card.told["lorasmith.run"].split("; ")
    assert card.told["lorasmith.config"] == "previews: sks at sea"
    shown = write_card(previewed, tmp_path / "shown", with_training_pictures=True)
    assert len(list((shown.folder / "training").iterdir())) == 4
    with pytest.raises(OptionError, match=r"has no LoRA of step 7; choose one of "):
        write_card(previewed, tmp_path / "none", step=7)
