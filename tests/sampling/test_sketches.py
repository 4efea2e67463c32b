"""Sketches of pictures that are being drawn: what decoded pictures teach, and how the view of a run has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.runs.view import RunView
from lorasmith.sampling import sketches
from lorasmith.sampling.sketches import Sketcher
from lorasmith.training.events import Drawing, Previewed, Sketched


@pytest.mark.parametrize("frames", [(), (2,)], ids=["picture", "clip"])
def test_a_sketch_has_the_colours_of_pictures_that_were_decoded(
    monkeypatch: pytest.MonkeyPatch, frames: tuple[int, ...]
) -> None:
    monkeypatch.setattr(sketches, "_EVERY_S", 0.0)
    shown: list[Image.Image] = []
    sketcher = Sketcher(shown.append)
    latents = torch.rand(1, 4, *frames, 6, 8)
    sketcher.see(latents)
    assert shown == []  # no picture was decoded yet
    first = latents[0] if not frames else latents[0, :, 0]
    pixels = ((0.2 + 0.5 * first[:3]) * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.movedim(0, -1).numpy()).resize((64, 48), Image.Resampling.NEAREST)
    sketcher.learn(latents, picture)
    sketcher.see(latents.flip(-1))
    (sketch,) = shown
    assert sketch.size == (8, 6)
    found = torch.from_numpy(np.array(sketch)).movedim(-1, 0)
    torch.testing.assert_close(found.float(), pixels.flip(-1).float(), atol=2, rtol=0)


def test_a_view_has_the_sketch_until_the_picture_is_there() -> None:
    view = RunView.of([Drawing(done=0, total=1), Sketched(picture="data:,")])
    assert view.to_json()["sketch"] == "data:," and view.activity == ("drawing previews", 0, 1)
    view.take(Previewed(step=1, prompts=("a",), paths=("a.png",), strength=1.0))
    assert view.to_json()["sketch"] == ""
