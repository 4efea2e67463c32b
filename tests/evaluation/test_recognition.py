"""What looks at pictures: image features, the built-in model's judge, and a CLIP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from benchmarks.quality.subjects import drawing
from lorasmith.core.errors import OptionError
from lorasmith.evaluation import likeness, recognition
from lorasmith.evaluation.clip_model import ClipModel
from lorasmith.evaluation.recognition import ClipRecogniser, DrawingRecogniser, Recogniser, recogniser_of
from lorasmith.evaluation.wishes import BACKGROUNDS, BUILT_IN_WISHES, STYLES
from lorasmith.formats.container import read_safetensors
from tests.small_clip import small_clip


def by_colour(pictures: list[Image.Image]) -> torch.Tensor:
    return F.normalize(likeness.colours(pictures), dim=1)


@pytest.fixture(autouse=True)
def quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse colours in place of the network's features, which take most of the time."""
    monkeypatch.setattr(likeness, "features", by_colour)


def test_the_judge_recognises_what_drawings_were_asked_for() -> None:
    """Of a fox, each set's drawing on each background, by its own words and by others."""
    drawn = [(words, place, drawing("fox", one, place)) for one, words in STYLES.items() for place in BACKGROUNDS]
    pictures = [one for _, _, one in drawn]
    judge = DrawingRecogniser()

    def followed(wishes: list[str]) -> torch.Tensor:
        found = judge.followed(wishes, pictures)
        assert found is not None and len(found) == len(pictures)
        return found

    by_style = torch.stack([followed([words] * len(drawn)) for words in STYLES.values()])
    torch.testing.assert_close(by_style.sum(0), torch.ones(len(drawn)))
    own = torch.tensor([[*STYLES.values()].index(words) for words, _, _ in drawn])
    assert (by_style.argmax(0) == own).float().mean() > 0.95, "of a subject that it was trained on"
    there = followed([f"a fox, on a {place} background" for _, place, _ in drawn])
    assert torch.equal(there, torch.ones(len(drawn)))
    assert followed([f"on a {place} background" for _, place, _ in drawn[1:] + drawn[:1]]).sum() == 0
    both = followed([f"{words}, on a {place} background" for words, place, _ in drawn])
    torch.testing.assert_close(both, followed([words for words, _, _ in drawn]))
    assert judge.followed(["on a beach"], pictures[:1]) is None, "it knows no beach"
    assert judge.followed([*BUILT_IN_WISHES], pictures[: len(BUILT_IN_WISHES)]) is not None


def test_features_of_drawings_are_both_alike() -> None:
    fox, other, rocket = (drawing(*one, "white") for one in (("fox", "noto"), ("fox", "twemoji"), ("rocket", "noto")))
    found = DrawingRecogniser().features([fox, other, rocket])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    alike = found @ found.T
    assert alike[0, 1] > alike[0, 2]
    plain = by_colour([fox, other, rocket])
    torch.testing.assert_close(alike, 0.3 * plain @ plain.T + 0.7 * _judged([fox, other, rocket]))


def _judged(pictures: list[Image.Image]) -> torch.Tensor:
    shown = F.normalize(recognition._judge().shown(recognition.tensors(pictures)), dim=1)
    return shown @ shown.T


def test_image_features_cannot_tell_a_wish_alone() -> None:
    pictures = [drawing("fox", one, "white") for one in STYLES]
    seen = Recogniser().wish_scores(["one", "two"], pictures)
    assert seen.followed is None and seen.features.shape[:2] == seen.colours.shape[:2] == (2, 2)
    assert torch.equal(seen.features[1, 0], by_colour(pictures[2:3])[0]), "the wishes of each noise in turn"


def test_who_looks_at_a_models_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert type(recogniser_of(is_built_in=True)) is DrawingRecogniser
    assert type(recogniser_of(is_built_in=False)) is Recogniser
    monkeypatch.setattr(recognition, "BUILT_IN_JUDGE", tmp_path / "judge.safetensors")
    assert type(recogniser_of(is_built_in=True)) is Recogniser, "an older built-in model comes without a judge"
    with pytest.raises(OptionError, match="must be a folder of a CLIP as transformers saves it"):
        recogniser_of(is_built_in=False, clip=tmp_path)


def cut(folder: Path) -> None:
    tensors, _ = read_safetensors(folder / "model.safetensors")
    kept = {name: one.clone() for name, one in tensors.items() if "layers.0.mlp" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))


def of_other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [cut, of_another_kind, of_other_sizes])
def test_what_is_no_whole_clip_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """And no pictures are judged by random weights."""
    damage(small_clip(tmp_path))
    with pytest.raises(OptionError, match="must be a folder of a CLIP as transformers saves it"):
        ClipModel(tmp_path)


def test_a_clip_chooses_among_the_wishes(tmp_path: Path) -> None:
    """Against transformers' own logits for pictures and texts, of a small CLIP with random weights."""
    folder = small_clip(tmp_path)
    pictures = [drawing("fox", one, place) for one, place in zip(STYLES, ("red", "blue", "white", "pink"), strict=True)]
    wishes = ["on a beach", "at sunset"] * 2
    found = ClipRecogniser(folder).followed(wishes, pictures)
    assert found is not None
    clip = ClipModel(folder)
    inputs = clip._tokenizer(wishes[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip._model(**inputs, **clip._processor(images=pictures, return_tensors="pt")).logits_per_image
    expected = logits.softmax(1)[range(4), [0, 1, 0, 1]]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
