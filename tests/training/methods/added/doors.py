"""What every door makes of the added feature, as JSON. `test_added_feature` runs it on a copy of the package."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

import lorasmith as ls
from lorasmith.cli.main import app
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset
from lorasmith.nodes import load_nodes
from lorasmith.runs.preview_budget import whole_program
from lorasmith.runs.spec import SETTINGS
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.joint import check_alike
from lorasmith.training.storage.records import RunRecord
from tests.training.hand_made import CHANNELS, HandMade


def found() -> dict[str, object]:
    model = ls.Trainable(HandMade(context=8), title="hand-made")  # which needs no library that takes seconds to import
    encoded = lambda text: ls.Conditioning({"context": torch.full((1, 5, 8), len(text) / 9)}, text)  # noqa: E731
    samples = (ls.Sample(torch.randn(CHANNELS, 8, 8), encoded("a cat")),)
    chosen = TrainConfig(steps=1, rank=2, targets="*.to_q", previews="", erase="a dog")
    trained = ls.train(model, EncodedDataset(samples, EncodedCaptions(encoded)), config=chosen)
    jobs = [plan_job(model, chosen) for _ in range(2)]
    try:
        check_alike(jobs)
    except ls.LorasmithError as error:
        refused = str(error)

    return {
        "help": "--erase-guidance" in CliRunner().invoke(app, ["train", "--help-all"]).output,
        "page": "erase" in SETTINGS,
        "node": "erase" in str(load_nodes()["TrainLoraNode"]),
        "loss": trained.losses[0],
        "slider": trained.lora.metadata.get("ss_slider"),
        "strengths": whole_program(chosen).strengths,
        "prompt": chosen.consequences().prompt,
        "idle": list(TrainConfig(erase_guidance=2.0).idle_settings()),
        "advice": RunRecord(config={"erase": "a dog"}).consequences.learns_no_subject,
        "together": refused,
    }


if __name__ == "__main__":
    print(json.dumps(found()))
