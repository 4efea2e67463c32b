"""`lorasmith bench` measures a step and says what limits it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lorasmith.cli import bench as bench_command
from lorasmith.core.options import options_of
from lorasmith.training.config import TrainConfig

Command = Callable[..., Any]

QUICK = ("--steps", 2, "--resolution", 32, "--targets", "*.0.attn2.*", "--rank", 4)


@pytest.mark.slow
def test_it_fits_on_a_screen_and_says_what_limits_the_step(lorasmith: Command) -> None:
    ran = lorasmith("bench", *QUICK, "--quantization", "int8")
    assert ran.code == 0, ran.err
    assert len(ran.out.splitlines()) <= 25
    for pattern in (
        r"batch 1 × 1, 32×32 pixels",
        r"^forward +\d+\.\d{3}",
        r"^floor +\d+\.\d{3} .* \d+\.\d +[\d,]+ +\d+\.\d$",
        r"^step +\d+\.\d{3} .* \d+\.\d +[\d,]+ +\d+\.\d$",
        r"^[\d,]+ images an hour",
        r"^A LoRA of 20 pictures: quick 300 seen, [\d.]+ min; balanced ",
        r"^\d+% of a step is the floor",
        r"^Waiting for data: \d+\.\d% of a step, beside which its batches take \d+\.\d ms$",
        r"MiB of frozen weights, and .* above them",
        r"^- (Products|Other operations|Between operations), \d+%",
        r"quantization int8 applies to 99\.\d% of the frozen weights",
    ):
        assert re.search(pattern, ran.out, flags=re.MULTILINE), (pattern, ran.out)


@pytest.mark.slow
def test_json_has_everything(lorasmith: Command) -> None:
    ran = lorasmith("bench", *QUICK, "--batch-size", 2, "--activations", "auto", "--no-floor", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["settings"]["rank"] == 4
    assert found["settings"]["batch_size"] == found["images"] == 2
    assert found["floor"] is None and found["of_floor"] is None
    assert len(found["step"]["seconds"]) == 2
    assert found["images_per_hour"] == pytest.approx(2 * 3600 / found["step_s"])
    assert [one["preset"] for one in found["presets"]] == ["quick", "balanced", "thorough"]
    for one in found["presets"]:
        assert one["minutes"] == pytest.approx(one["seen"] / 2 * found["step_s"] / 60)
    assert found["counts"]["flops"] > 0 and found["counts"]["held"] > 0
    assert len(found["waited"]["seconds"]) == 2
    assert found["waiting"] == pytest.approx(sum(found["waited"]["seconds"]) / sum(found["step"]["seconds"]))
    assert found["limits"]
    assert found["plan"]["activations"] == "keep"  # there is memory enough for this model


def test_sizes_that_the_model_does_not_take_are_refused(lorasmith: Command) -> None:
    ran = lorasmith("bench", "--resolution", 40)
    assert ran.code == 1
    assert "resolution must be a multiple of 16" in ran.err


def test_its_options_are_those_of_train_that_change_the_cost() -> None:
    app = typer.Typer()
    bench_command.register(app)
    out = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    shown = {name for name in options_of(TrainConfig) if f"--{name.replace('_', '-')}" in re.split(r"[\s,│]+", out)}
    memory = {name for name, one in options_of(TrainConfig).items() if one.group == "Memory"} - {"bypass_mode"}
    assert shown >= memory | {"compile", "batch_size", "rank", "targets", "algorithm", "optimizer", "training_dtype"}
    assert not shown & {"learning_rate", "seed", "previews", "save_state_every", "existing_lora"}
