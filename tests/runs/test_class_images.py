from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import CancelledError
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import FolderScan
from lorasmith.families.model import Model
from lorasmith.runs import class_images
from lorasmith.runs.class_images import class_scan
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host
from lorasmith.runs.run_plan import ClassImageDrawn
from lorasmith.training.events import Event
from tests.hosts import Audience
from tests.runs.folder_cases import asked

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str | None]]:
    """Seeds and prompts of pictures, which are drawn in two steps."""
    seen: list[tuple[int, str | None]] = []
    real = class_images.clips

    def clips(denoiser, positives, negative, sampling, **options):
        seen.append((sampling.seed, positives[0].text))
        return real(denoiser, positives, negative, class_images.replace(sampling, steps=2), **options)

    monkeypatch.setattr(class_images, "clips", clips)
    return seen


def drawn(tiny: Model, **settings: object) -> tuple[FolderScan | None, list[Event]]:
    audience = Audience()
    return class_scan(DataConfig(**settings), tiny, device=CPU, host=audience), audience.events  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_base_model_draws_what_is_missing_and_no_more(tiny: Model, sampled: list) -> None:
    settings = {"class_prompt": "a fox | a cat", "resolution": 32, "prior_weight": 0.5, "trigger": "sks"}
    scan, events = drawn(tiny, class_count=3, **settings)
    assert scan is not None and len(scan.images) == 3
    assert sampled == [(0, "a fox"), (1, "a cat"), (2, "a fox")]
    assert [(e.done, e.total) for e in events if isinstance(e, ClassImageDrawn)] == [(1, 3), (2, 3), (3, 3)]
    assert [image.caption for image in scan.images] == ["a fox", "a cat", "a fox"], "without the trigger"
    assert all(image.is_class and image.weight == 0.5 and image.width == 32 for image in scan.images)
    drawn(tiny, class_count=4, **settings)
    assert len(sampled) == 4, "one more"
    again, events = drawn(tiny, class_count=2, **settings)
    assert again is not None and again.images == scan.images[:2] and not events and len(sampled) == 4
    drawn(tiny, class_count=1, **{**settings, "class_prompt": "a dog"})
    assert len(sampled) == 5, "other prompts are other pictures"


def test_pictures_of_a_folder_are_used_with_their_captions(tiny: Model, tmp_path: Path, sampled: list) -> None:
    folder = tmp_path / "dogs"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (32, 32)).save(folder / name)
    (folder / "1.txt").write_text("a brown dog")
    scan, events = drawn(tiny, class_images=str(folder), class_prompt="a dog", masks="alpha", crop="mask")
    assert scan is not None and [image.caption for image in scan.images] == ["a brown dog", "a dog"]
    assert not events and not sampled
    assert drawn(tiny)[0] is None


def test_stopping_keeps_what_was_drawn(tiny: Model, sampled: list) -> None:
    settings = DataConfig(class_prompt="a fox", class_count=3, resolution=32)

    class Impatient(Host):
        def cancelled(self) -> bool:
            return len(sampled) == 2

    with pytest.raises(CancelledError, match="those drawn are kept"):
        class_scan(settings, tiny, device=CPU, host=Impatient())
    class_scan(settings, tiny, device=CPU, host=Host())
    assert [seed for seed, _ in sampled] == [0, 1, 1, 2]


def test_the_class_is_trained_beside_the_subject_and_never_held_out(images: Path, sampled: list) -> None:
    settings = {"class_prompt": "a fox", "class_count": 2, "prior_weight": 0.25, "resolution": 32}
    run = plan(asked(images, **settings, validation_share=0.5), Host())
    assert len(run.data) == 4 + 2 and run.summary.samples_per_epoch == 2 + 2
    assert [(sample.is_class, sample.weight) for sample in run.data.samples[-2:]] == [(True, 0.25)] * 2
    assert run.data.samples[-1].conditioning.text == "a fox"
