"""`lorasmith targets` says what `lorasmith train` will train."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.families.loading import load_structure
from lorasmith.families.locating import built_in_models
from lorasmith.training.config import TrainConfig
from lorasmith.training.targets_summary import summarise_targets
from tests.covering import slow_except

Command = Callable[..., Any]

CHOICES: dict[str, tuple[str, ...]] = {
    **{name: ("--algorithm", name, "--rank", "4") for name in ALGORITHMS},
    "DoRA": ("--dora", "input", "--rank", "4"),
    "DoRA of PiSSA": ("--dora", "output", "--pissa", "--rank", "4"),
    "Tucker": ("--tucker", "--rank", "4"),
    "differences": ("--differences", "norms+biases", "--rank", "4"),
    "capped": ("--rank", "128"),
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", slow_except(CHOICES, "LoKr", "DoRA of PiSSA", "differences"))
def test_counts_are_those_of_the_run_and_the_size_is_that_of_the_file(
    lorasmith: Command, photos: Path, tmp_path: Path, choice: str
) -> None:
    targets = "*.resnets.0.conv1, *.0.attn2.*, conv_out"
    options = ("--model", "lorasmith-tiny", "--targets", targets, *CHOICES[choice])
    shown = lorasmith("targets", *options)
    assert shown.code == 0, shown.err
    found = re.search(r"(\d+) of 133 layers, ([\d,]+) parameters, a file of about ([\d.]+) MiB in bf16", shown.out)
    assert found is not None, shown.out

    assert lorasmith("train", photos, *options, "--steps", 1, "--output", "run", "--name", "x").code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    trained = {**record["adapters"], **{f"{path} ±": n for path, n in record["differences"].items()}}
    assert int(found[1]) == len(record["adapters"])
    assert int(found[2].replace(",", "")) == sum(trained.values())
    config = TrainConfig(**record["config"])
    file = tmp_path / "run" / "x.safetensors"
    metadata = int.from_bytes(file.read_bytes()[:8], "little") - 130 * len(load_file(file))
    size = summarise_targets(load_structure("lorasmith-tiny").denoiser, config).size_bytes
    assert size == pytest.approx(file.stat().st_size - max(metadata, 0), rel=0.1)


def test_layers_are_grouped_by_kind_and_settings(lorasmith: Command) -> None:
    targets = "*.attn2.to_q lr=1e-3, up_blocks.*.to_q alpha=2, !*.x"
    ran = lorasmith("targets", "--model", "lorasmith-tiny", "--targets", targets)
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines() if "to_q" in line and "Linear" in line]
    kinds = ["transformer_blocks.*.attn2.to_q", "transformer_blocks.*.attn1.to_q", "transformer_blocks.*.attn2.to_q"]
    assert [row[:2] for row in rows] == [[kind, "Linear"] for kind in kinds]  # with a rate, an alpha, and both
    assert "Alpha" in ran.out
    assert "Rate" in ran.out
    assert "!*.x excludes nothing" in ran.out


@pytest.mark.parametrize(
    ("algorithm", "word"), [("LoRA", "Rank"), ("LoKr", "Factor"), ("boft", "Block size"), ("Full", None)]
)
def test_rank_is_called_what_it_is(lorasmith: Command, algorithm: str, word: str | None) -> None:
    out = lorasmith("targets", "--model", "lorasmith-tiny", "--algorithm", algorithm, "--rank", 4).out
    header = next(line for line in out.splitlines() if line.startswith("Layers"))
    assert [one for one in ("Rank", "Factor", "Block size") if one in header] == ([word] if word else [])


def test_the_structure_of_a_file_costs_no_weights() -> None:
    model = load_structure(built_in_models()["lorasmith-tiny"])
    weights = {name: p.device.type for name, p in model.components.denoiser.named_parameters() if p.ndim > 1}
    assert set(weights.values()) == {"meta"}
    assert not model.components.text_encoders
    assert model.components.vae is None


def test_a_structure_is_the_loaded_models(tiny: Any) -> None:
    outline = load_structure("lorasmith-tiny")
    shapes = {name: p.shape for name, p in tiny.components.denoiser.named_parameters()}
    assert {name: p.shape for name, p in outline.components.denoiser.named_parameters()} == shapes
    assert outline.defaults.targets == tiny.defaults.targets
    assert outline.components.parameterization == tiny.components.parameterization
    assert torch.equal(
        outline.components.denoiser.get_parameter("conv_in.bias"),
        tiny.components.denoiser.get_parameter("conv_in.bias"),
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
        (("--model", "lorasmith-tiny", "--targets", "*.nope"), "*.nope matches none"),
        (("--model", "lorasmith-tiny", "--algorithm", "LoRAX"), "algorithm must be one of"),
        (("--model", "lorasmith-tiny", "--algorithm", "OFT", "--dora", "input"), "dora is for LoRA, LoHa, LoKr"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(lorasmith: Command, arguments: tuple[str, ...], sentence: str) -> None:
    ran = lorasmith("targets", *arguments)
    assert ran.code == 1
    assert sentence in ran.err
    assert "Traceback" not in ran.err + ran.out
