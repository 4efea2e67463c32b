from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.data.folder import CaptionSource, FolderScan, ImageFile
from lorasmith.runs.run_plan import RunPlan, captions_used
from lorasmith.training.config import TrainConfig


def plan(*captions: str, trigger: str = "", repeats: int = 1) -> RunPlan:
    files = tuple(ImageFile(Path(f"{one}.png"), 64, 64, one, "file", repeats) for one in captions)
    return RunPlan(
        folder=Path("photos"),
        scan=FolderScan(files, (), (), ()),
        trigger=trigger,
        model="m",
        family="f",
        resolutions=(512,),
        pixel_multiple=64,
        trained="LoRA",
        parameters=1,
        config=TrainConfig(steps=10, batch_size=3, grad_accumulation_steps=2),
        notes=(),
    )


def test_repeats_count_in_an_epoch() -> None:
    repeated = plan("a", "b", repeats=5)
    assert (repeated.samples, repeated.samples_per_epoch, repeated.epochs) == (60, 10, 6.0)


def test_held_out_images_do_not_count_in_an_epoch() -> None:
    shorter = replace(plan("a", "b", "c", repeats=2), held_out=("b.png",))
    assert (shorter.samples_per_epoch, shorter.epochs) == (4, 15.0)


def image(source: CaptionSource, caption: str) -> ImageFile:
    return ImageFile(Path("1.png"), 64, 64, caption, source)


def test_what_the_captions_are_is_said_by_their_origin() -> None:
    images = [image("file", "a cat"), image("metadata", "b"), image("trigger", "sks"), image("folder", "fox")]
    assert captions_used(images, "sks") == (
        "a caption of its own for 2 of 4 images, the trigger 'sks' for 1 of 4 images, "
        "the name of the folder, 'fox' for 1 of 4 images"
    )
    assert captions_used([image("none", "")] * 11, "") == "none for 11 of 11 images"


@pytest.mark.parametrize(
    ("captions", "trigger", "prompt"),
    [(("", "a cat"), "", "a cat"), (("a cat",), "sks", "sks"), (("", ""), "", "a picture")],
)
def test_a_prompt_to_show_what_was_learnt(captions: tuple[str, ...], trigger: str, prompt: str) -> None:
    assert plan(*captions, trigger=trigger).prompt == prompt
