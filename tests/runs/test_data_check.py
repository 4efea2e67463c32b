"""Checking a folder with a model: its sizes and its tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from spiece_models import spiece_model
from transformers import ByT5Tokenizer

from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.captions import CaptionRules
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import scan_folder
from lorasmith.families.base import FAMILIES
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.parts.clip import clip_tokenizer
from lorasmith.families.parts.encoders import TokenizerSource, qwen_tokenizer, spiece_tokenizer, t5_tokenizer
from lorasmith.runs.data_check import check_folder, check_scan, plain, token_counter
from lorasmith.runs.run_plan import ImagesChecked
from tests.data.test_preflight import add, photo

FOX = BUILT_IN_BASE / "input" / "fox"
TOKENIZERS: dict[str, Any] = {"clip_l": clip_tokenizer, "clip_g": clip_tokenizer, "clip_h": clip_tokenizer}
_BYTE_LEVEL = ("qwen25vl", "qwen3", "qwen3vl", "mistral", "ministral3_3b")
TOKENIZERS |= {"t5xxl": t5_tokenizer, "byt5_small": ByT5Tokenizer} | dict.fromkeys(_BYTE_LEVEL, qwen_tokenizer)


def small_vocabulary() -> Any:
    """Of a few letters, as the package has the vocabularies of neither."""
    vocabulary = torch.frombuffer(bytearray(spiece_model("unigram")), dtype=torch.uint8)
    source = TokenizerSource(embedded={"spiece_model": vocabulary})
    return spiece_tokenizer(source, file_name="spiece.model", rows=64, adds_eos=True)


TOKENIZERS |= dict.fromkeys(("gemma2", "umt5xxl"), small_vocabulary)


@functools.cache
def made(tokenizer: Callable[[], Any]) -> Any:
    return tokenizer()


@pytest.mark.parametrize("folder", [FOX, FOX.with_name("high-contrast")])
def test_example_pictures_and_the_built_in_model_need_no_look(folder: Path) -> None:
    check = check_folder(folder, DataConfig(), files=ModelFiles(BUILT_IN))
    assert check.preflight.findings == ()
    assert (check.model, check.is_size_assumed) == (BUILT_IN, False)
    assert all(one.tokens for one in check.preflight.images) and check.preflight.limit is not None


def test_without_a_model_sizes_are_assumed_and_tokens_not_counted() -> None:
    check = check_folder(FOX, DataConfig())
    assert (check.model, check.is_size_assumed, check.preflight.resolutions) == (None, True, (256,))
    assert check.preflight.findings == () and check.preflight.limit is None
    assert not check_folder(FOX, DataConfig(resolution=512)).is_size_assumed


def test_the_model_decides_sizes(tiny: Model) -> None:
    scan = scan_folder(FOX)
    found = check_scan(scan, DataConfig(), folder=FOX, model=tiny).preflight
    assert (found.resolutions, found.multiple) == ((tiny.defaults.resolution,), tiny.defaults.pixel_multiple)
    larger = check_scan(scan, DataConfig(resolution=512), folder=FOX, model=tiny).preflight
    assert [one.kind for one in larger.findings] == ["tiny pictures"]


def test_the_longest_of_several_captions_counts_with_its_trigger(tiny: Model, tmp_path: Path) -> None:
    add(tmp_path / "1.png", photo(1), "a fox\na fox and " + "another and " * 90)
    config = DataConfig(caption_lines=True, trigger="sks", prefix="photo of")
    (one,) = check_scan(scan_folder(tmp_path, config), config, folder=tmp_path, model=tiny).preflight.images
    count = token_counter(tiny)[0]
    assert count is not None and one.tokens == count(
        CaptionRules.of(config, is_class=False).plain(one.file.captions[1:])
    )


def test_captions_are_counted_by_the_model_s_tokenizer(tiny: Model, tmp_path: Path) -> None:
    add(tmp_path / "1.png", photo(1), "a fox")
    add(tmp_path / "2.png", photo(2), "a fox and " * 200)
    found = check_scan(scan_folder(tmp_path), DataConfig(), folder=tmp_path, model=tiny).preflight
    assert [one.kind for one in found.findings] == ["long captions"] and found.findings[0].images == (1,)
    (short, long), count = (one.tokens for one in found.images), token_counter(tiny)[0]
    assert count is not None and short == count("a fox") < 5 and long is not None and long >= 600


@pytest.mark.parametrize(
    ("name", "config", "rule"),
    [
        *((name, {}, None) for name in sorted(dict(FAMILIES.items())) if name != "wan-i2v"),
        ("wan-i2v", {"image_dim": 1280}, "that Wan image to video reads"),  # 2.1, which finds the text by its length
        ("wan-i2v", {"image_dim": None}, None),
    ],
)
def test_captions_have_a_limit_only_where_tokens_are_cut_or_read_in_chunks(
    name: str, config: dict[str, Any], rule: str | None
) -> None:
    family = FAMILIES[name]
    denoiser = SimpleNamespace(config=SimpleNamespace(**{"image_dim": None, **family.released, **config}))
    tokenizers = {part: made(TOKENIZERS[slot.kind]) for part, slot in family.text_encoders.items()}
    model = SimpleNamespace(family=family, components=SimpleNamespace(tokenizers=tokenizers, denoiser=denoiser))
    count, limit = token_counter(model)  # type: ignore[arg-type]
    is_clip = all(slot.kind.startswith("clip") for slot in family.text_encoders.values())
    if is_clip:
        rule = f"that the text encoder of {family.title} was made for"
    expected = None if rule is None else (225 if is_clip else 512, rule)
    assert (None if limit is None else (limit.longest, limit.rule)) == expected
    assert count is not None
    assert count("") == 0 and 2 <= count("a fox") <= 6 and count("a fox " * 1000) > 1000


def test_a_model_without_text_encoders_counts_nothing() -> None:
    model = SimpleNamespace(family=FAMILIES["sd1"], components=SimpleNamespace(tokenizers={}))
    assert token_counter(model) == (None, None)  # type: ignore[arg-type]


def test_json_values(tmp_path: Path) -> None:
    add(tmp_path / "2_dog" / "1.png", photo(1), "a dog")
    add(tmp_path / "2_dog" / "2.png", photo(1), "a dog")
    (tmp_path / "3.heic").touch()
    values = json.loads(json.dumps(plain(check_folder(tmp_path, DataConfig(), batch=3))))
    assert values["images"][0]["name"] == "2_dog/1.png" and values["images"][0]["bucket"] == [256, 256]
    assert values["images"][1]["findings"] == ["copies"] and values["alike"] == [["2_dog/1.png", "2_dog/2.png"]]
    assert [one["kind"] for one in values["findings"]] == ["unused files", "copies"]
    assert values["findings"][1]["images"] == ["2_dog/2.png"] and not values["is_fine"]
    assert values["skipped"][0]["name"] == "3.heic" and values["buckets"][0]["samples"] == 4
    assert (values["samples_per_epoch"], values["batch"], values["steps_per_epoch"]) == (4, 3, 2)


def test_a_metadata_file_stands_for_its_folder(tmp_path: Path) -> None:
    add(tmp_path / "in" / "1.png", photo(1))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "in/1.png", "text": "a dog"}\n', encoding="utf-8")
    found = check_folder(tmp_path / "metadata.jsonl", DataConfig()).preflight
    assert (found.folder, [one.name for one in found.images]) == (tmp_path, ["in/1.png"])
    assert found.findings == () and found.captioned == 1


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        check_folder(tmp_path / "none", DataConfig())
    with pytest.raises(ModelError, match=r"none\.safetensors"):
        check_folder(FOX, DataConfig(), files=ModelFiles("none.safetensors"))


def test_the_event_carries_the_check() -> None:
    check = check_folder(FOX, DataConfig())
    assert ImagesChecked(check=check).check is check


@pytest.mark.usefixtures("previews_measured")
def test_photos_of_something_else_and_mirrored_ones_are_named(tmp_path: Path) -> None:
    for path in sorted(FOX.glob("*.png")):
        add(tmp_path / path.name, Image.open(path), "a drawing of a fox")
    others = sorted(FOX.with_name("high-contrast").glob("*.png"))[:2]
    for path in others:
        add(tmp_path / f"x_{path.name}", Image.open(path), "a drawing")
    first = Image.open(FOX / "fox_1.png")
    add(tmp_path / "a.png", first.resize((first.width // 2, first.height // 2)), "a drawing of a fox")  # a look-alike
    add(tmp_path / "y.png", ImageOps.mirror(Image.open(FOX / "fox_1.png")), "a drawing of a fox")
    check = check_folder(tmp_path, DataConfig())
    found = {one.kind: one for one in check.preflight.findings}
    names = {kind: [check.preflight.images[index].name for index in one.images] for kind, one in found.items()}
    assert names["odd ones out"] == [f"x_{path.name}" for path in others]
    assert "8 images show much the same (fox), and 2 others show something else" in found["odd ones out"].problem
    assert names["much alike"] == ["y.png"] and "y.png (like fox_1.png)" in found["much alike"].sentence
