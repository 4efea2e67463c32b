"""Pairs whose controls the text encoder sees: captions with pictures, cache and draws, and towers that are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_models import save
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_models import TINY

import lorasmith.families.model as handles
from lorasmith.core.errors import ModelError
from lorasmith.core.random import keyed_uniform
from lorasmith.data.encoder_digest import text_encoder_digest
from lorasmith.data.encoding import load_dataset
from lorasmith.families.base import FAMILIES
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.training.batches import drawn_captions

SMALL = {"most_pixels": 64**2, "pixels": 56**2}  # of controls, and of what is seen of them


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return TINY["qwen-image"].saved(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def edit(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Model:
    """Qwen-Image-Edit 2509 with small controls."""
    family = FAMILIES["qwen-image"]
    forms = [
        replace(one, most_pixels=SMALL["most_pixels"], sight=replace(one.sight, pixels=SMALL["pixels"]))
        for one in family.controls
        if one.sight is not None
    ]
    monkeypatch.setattr(type(family), "controls", tuple(forms))
    return TINY["qwen-image"].loaded(files).as_edit("edit-2509")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for place, size in (("", (64, 64)), ("control", (64, 64)), ("control_1", (96, 32))):
        (tmp_path / "pairs" / place).mkdir(exist_ok=True, parents=True)
        for name in "ab":
            pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pairs" / place / f"{name}.png")
    return tmp_path / "pairs"


def seen_of(model: Model, folder: Path, name: str, *, mirrored: bool = False) -> list[Tensor]:
    """Pixels of the controls in the sizes in which they are seen: 56×56 and 112×28."""
    assert model.sight is not None
    found = []
    for place in ("control", "control_1"):
        with Image.open(folder / place / name) as picture:
            shown = picture.resize(model.sight.size(*picture.size), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None].float() / 127.5 - 1
        found.append(pixels.flip(-1) if mirrored else pixels)
    return found


def close(ours: Tensor, expected: Tensor) -> bool:
    return ours.shape == expected.shape and bool((ours - expected).norm() <= 2e-2 * expected.norm())


@pytest.mark.slow
def test_captions_are_encoded_with_the_pictures_of_each_draw(pairs: Path, edit: Model) -> None:
    """Dropping a caption keeps its pictures; dropping controls leaves them out of the text as well."""
    settings: dict[str, Any] = {"caption_dropout": 0.5, "control_dropout": 0.5, "trigger": "blue", "flip": True}
    data = load_dataset(pairs, edit, resolution=64, **settings)
    encode = edit.text_encoder.encode
    for sample in data:
        expected = {
            (text, which): encode(text, pictures, sight=edit.sight if pictures else None).tensors["context"]
            for text in ("blue", "")
            for which, pictures in {
                "straight": seen_of(edit, pairs, sample.name),
                "mirrored": seen_of(edit, pairs, sample.name, mirrored=True),
                "none": [],
            }.items()
        }
        assert close(sample.conditioning.tensors["context"], expected["blue", "straight"])
        drawn = set()
        assert sample.variants is not None
        for draw in range(40):
            found = sample.drawn(7, draw)
            which = "mirrored" if torch.equal(found.latents, sample.variants.pictures[1].latents) else "straight"
            which = "none" if keyed_uniform(7, "controls", draw) < 0.5 else which
            text = found.conditioning.text
            assert text is not None
            fitting = [key for key, one in expected.items() if close(found.conditioning.tensors["context"], one)]
            assert fitting == [(text, which)]
            assert len(found.conditioning.controls) == (0 if which == "none" else 2)
            drawn.add((text, which))
        assert len(drawn) == 6


def test_streamed_encoders_see_what_placed_ones_see(pairs: Path, edit: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen, found = edit.text_encoder, seen_of(edit, pairs, "a.png"), []
    for names in (set(), {*encoder.encoders.modules}):
        monkeypatch.setattr(handles.TextEncoder, "_streamed", lambda self, device, *, sees, names=names: names)
        with encoder.active(sees=True):
            found.append(encoder.encode("blue", seen, sight=edit.sight).tensors)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def test_captions_with_pictures_are_cached_by_what_is_seen(pairs: Path, edit: Model) -> None:
    found = [load_dataset(pairs, edit, resolution=64).captions for _ in range(2)]
    assert [one.encoded for one in found if one is not None] == [2, 0]
    varied: dict[str, Any] = {"resolution": 64, "flip": True}
    for repeated in (False, True):
        data = load_dataset(pairs, edit, **varied)
        assert data.captions is not None
        wanted = drawn_captions(data.samples, range(30), seed=1, most=100)
        assert wanted is not None and len(wanted) == 4, "two pairs, straight and mirrored"
        before = data.captions.encoded
        data.captions.encode_ahead(wanted)
        assert before == 0 and data.captions.encoded == (0 if repeated else 2)
        assert drawn_captions(data.samples, range(10**6), seed=1, most=100) is not None
        assert drawn_captions(data.samples, range(10**6), seed=1, most=3) is None
    with Image.open(pairs / "control" / "a.png") as picture:
        picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(pairs / "control" / "a.png")
    data = load_dataset(pairs, edit, **varied)
    assert data.captions is not None and data.captions.encoded == 1, "that of the changed control"


def test_captions_that_do_not_fit_in_memory_are_encoded_with_their_pictures_when_drawn(
    pairs: Path, edit: Model
) -> None:
    settings: dict[str, Any] = {"resolution": 64, "flip": True, "cache": False, "trigger": "blue"}
    ahead, later = (load_dataset(pairs, edit, **settings) for _ in range(2))
    assert ahead.captions is not None and later.captions is not None
    ahead.captions.encode_ahead(drawn_captions(ahead.samples, range(20), seed=1, most=100) or [])
    with later.captions.staying():
        for one, other in zip(ahead, later, strict=True):
            for draw in range(4):
                contexts = [sample.drawn(1, draw).conditioning.tensors["context"] for sample in (one, other)]
                assert torch.equal(*contexts)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    found: list[nn.Module] = []
    place = handles.placed_with_patches

    def recorded(module: nn.Module, *given: Any, **more: Any) -> AbstractContextManager[None]:
        found.append(module)
        return place(module, *given, **more)

    monkeypatch.setattr(handles, "placed_with_patches", recorded)
    yield found


@pytest.mark.slow
def test_a_model_that_draws_from_text_places_no_tower_and_its_captions_are_those_without_one(
    pairs: Path, files: dict[str, Path], placed: list[nn.Module], tmp_path: Path
) -> None:
    model = TINY["qwen-image"].loaded(files)
    tower = model.text_encoder.tower("text_encoder")
    assert tower is not None and not any(one is tower for one in model.components.modules().values())
    load_dataset(pairs, model, resolution=64, controls="none", cache=False)
    assert placed and tower not in placed
    tensors = {name: one for name, one in load_file(files["text_encoder"]).items() if not name.startswith("visual.")}
    without = load_model(
        files["transformer"], text_encoders=[save(tmp_path / "text.safetensors", tensors)], vae=files["vae"]
    )
    assert without.text_encoder.tower("text_encoder") is None
    assert text_encoder_digest(model) == text_encoder_digest(without)
    sight = FAMILIES["qwen-image"].controls[0].sight
    assert text_encoder_digest(model, sight=sight) != text_encoder_digest(model)


def test_the_tower_is_placed_once_for_all_captions_with_pictures(
    pairs: Path, edit: Model, placed: list[nn.Module]
) -> None:
    load_dataset(pairs, edit, resolution=64, cache=False)
    assert edit.text_encoder.tower("text_encoder") in placed


def test_an_encoder_without_a_tower_is_refused_before_anything_is_encoded(
    pairs: Path, edit: Model, files: dict[str, Path], tmp_path: Path, placed: list[nn.Module]
) -> None:
    tensors = {name: one for name, one in load_file(files["text_encoder"]).items() if not name.startswith("visual.")}
    text = save(tmp_path / "text.safetensors", tensors)
    model = load_model(files["transformer"], text_encoders=[text], vae=files["vae"], edit="edit-2509")
    with pytest.raises(
        ModelError,
        match=r"needs a text encoder that sees pictures, .* no tensors visual\.\*; give a whole qwen_2\.5_vl_7b",
    ):
        load_dataset(pairs, model, resolution=64)
    assert not placed
