"""What is asked of a run while it trains: previews, its LoRA, a drawing. None of it changes the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import TRIED
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.runs.run import run
from lorasmith.runs.view import RunView
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, LoraSaved, Previewed, PromptDrawn, StepDone, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.results import TrainResult
from lorasmith.training.run_requests import REQUESTS, DrawRequest, request
from lorasmith.training.train import Plan
from tests.hosts import Audience

Train = Callable[..., TrainResult]


@pytest.fixture
def train(tiny: Model, captions: list[Conditioning], tmp_path: Path) -> Train:
    """Train four steps, with an audience and other settings."""

    def run_with(audience: Audience, name: str = "run", **settings: Any) -> TrainResult:
        data = EncodedDataset(
            tuple(
                Sample(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(n)), captions[0], f"{n}.png")
                for n in range(3)
            )
        )
        given = {"steps": 4, "rank": 2, "targets": "*.attn2.to_q", "training_dtype": "fp32", "previews": ""}
        denoiser = replace(tiny.denoiser) if settings.pop("draws", True) else None
        job = plan_job(tiny.denoiser, TrainConfig(**{**given, **settings}), "cpu")
        return run(Plan(denoiser=denoiser, job=job, data=data, title="pets", output=tmp_path / name), audience)

    return run_with


def at(step: int, do: Callable[[], object]) -> Callable[[Event], None]:
    """Do something when a step is done."""

    def taken(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            do()

    return taken


def test_a_requested_preview_and_lora_change_no_number(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def ask() -> None:
        assert request(folder, "preview") == "preview"
        request(folder, "save")

    audience = Audience(also=at(2, ask))
    settings = {"previews": "a lion", "preview_steps": 1, "preview_every": 3, "preview_strengths": ""}
    asked = train(audience, **settings)
    plain = train(Audience(), "plain", **settings)
    assert asked.losses == plain.losses
    assert asked.path is not None and plain.path is not None
    mine, others = load_file(asked.path), load_file(plain.path)
    assert mine.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in mine.items())
    shown = [(one.step, one.strength) for one in audience.events if isinstance(one, Previewed)]
    assert shown == [(0, 0.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    (saved,) = [one for one in audience.events if isinstance(one, LoraSaved)]
    assert (saved.step, Path(saved.path).name) == (2, "pets-step00000002.safetensors")
    assert RunView.of(audience.events).to_json()["saves"] == [{"step": 2, "file": "pets-step00000002.safetensors"}]
    assert Path(saved.path).exists() and not (folder / "preview.safetensors").exists()
    assert not (folder / REQUESTS).exists()


@pytest.mark.slow
def test_a_prompt_is_drawn_while_the_run_trains(train: Train, tmp_path: Path) -> None:
    folder, ids = tmp_path / "run", list[str]()

    def ask() -> None:
        if not ids:
            request(folder, "save")
            ids.append(request(folder, DrawRequest(prompt="a <b>lion</b>", strength=0.5, seed=3)))
            ids.append(request(folder, DrawRequest(prompt="a bus", lora="pets-step00000001.safetensors")))
            ids.append(request(folder, DrawRequest(prompt="a bus", lora="../run.json")))
            (folder / REQUESTS / "draw-ab.json").write_text("{}")

    audience = Audience(also=at(1, ask))
    asked = train(audience)
    assert asked.losses == train(Audience(), "plain").losses
    drawn = {one.id: one for one in audience.events if isinstance(one, PromptDrawn)}
    now, saved, absent = (drawn[id] for id in ids)
    assert (now.step, now.lora, now.strength, now.seed, now.error) == (1, "", 0.5, 3, "")
    assert [Path(one).parent for one in (*now.paths, *saved.paths)] == [folder / TRIED] * 4
    plain, tuned = (Image.open(path) for path in now.paths)
    assert plain.tobytes() != tuned.tobytes()
    assert "pets, while it was trained:0.5" in tuned.text["parameters"]  # type: ignore[attr-defined]
    assert absent.paths == () and "choose one of these" in absent.error
    assert [one.message for one in audience.events if isinstance(one, Warned)][-1].startswith("The request draw-ab")
    view = RunView.of(audience.events).to_json()
    assert [one["id"] for one in view["drawn"]] == ids
    assert view["drawn"][0]["pictures"][0].startswith(f"{TRIED}/")


def test_what_a_run_cannot_do_is_said(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(OptionError, match="a request is for a run that is being trained"):
        request(folder, "preview")

    def ask() -> None:
        request(folder, "preview")
        request(folder, DrawRequest(prompt="a bus"))

    audience = Audience(also=at(3, ask))
    train(audience, draws=False)
    (drawn,) = [one for one in audience.events if isinstance(one, PromptDrawn)]
    assert drawn.error.startswith("drawing needs a model of a known family")
    assert "A preview was requested, but this run draws none; set previews." in [
        one.message for one in audience.events if isinstance(one, Warned)
    ]
    with pytest.raises(OptionError, match="is not; name another one"):
        request(folder, "save")


def test_requests_that_come_too_late_are_removed(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    audience = Audience(also=at(4, lambda: request(folder, "save")))
    train(audience)
    assert not (folder / REQUESTS).exists() and not any(isinstance(one, LoraSaved) for one in audience.events)
