from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.app.run_plan import RunPlan
from lorasmith.data.folder import FolderScan, ImageFile
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


@pytest.mark.parametrize(
    ("captions", "trigger", "prompt"),
    [(("", "a cat"), "", "a cat"), (("a cat",), "sks", "sks"), (("", ""), "", "a picture")],
)
def test_a_prompt_to_show_what_was_learnt(captions: tuple[str, ...], trigger: str, prompt: str) -> None:
    assert plan(*captions, trigger=trigger).prompt == prompt
