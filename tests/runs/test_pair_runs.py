"""Runs on folders of pairs: what the record says, resuming to the bit, reproducing, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformer_models import TINY

from lorasmith.cli.main import main
from lorasmith.core.errors import DataError
from lorasmith.data.data_config import ImageSource
from lorasmith.runs.plan import plan
from lorasmith.runs.recorded_run import Typed, read_run_file
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.sweep_file import read_sweep
from tests.hosts import Audience


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return TINY["flux2-klein"].saved(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of 64×64, with two controls of other sizes each."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for place, size in (("after", (64, 64)), ("before", (32, 64)), ("depth", (96, 32))):
        (folder / place).mkdir()
        for name in "abc":
            pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / place / f"{name}.png")
    return folder


def asked(klein: dict[str, Path], pairs: Path, **settings: Any) -> RunSpec:
    quick = {"rank": 2, "targets": "*.attn.to_q", "steps": 4, "previews": "", "resolution": 64, "flip": True}
    control = (str(pairs / "before"), str(pairs / "depth"))
    return RunSpec(
        sources=(ImageSource(str(pairs / "after")),),
        model=str(klein["transformer"]),
        text_encoders=(str(klein["text_encoder"]),),
        vae=str(klein["vae"]),
        name="cat",
        settings={**quick, "control": control, "trigger": "blue", "control_dropout": 0.25, **settings},
    ).resolved()


def test_files_of_settings_name_controls(
    klein: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pairs / "run.toml"
    file.write_text('model = "m.safetensors"\nedit = "kontext"\nsources = "after"\ncontrol = ["before", "depth"]\n')
    spec = read_run_file(file, Typed(spec=RunSpec())).resolved()
    assert spec.data.control == (str(pairs / "before"), str(pairs / "depth"))
    assert (spec.edit, spec.files.edit) == ("kontext", "kontext")
    assert ("control", str(pairs / "depth")) in list(spec.named_files())
    assert "--edit kontext" in " ".join(spec.command())
    assert RunSpec.from_record({**spec.to_record()}, {}).data == spec.data


def test_the_runs_of_a_sweep_have_controls(pairs: Path) -> None:
    file = pairs / "sweep.toml"
    head = 'model = "m.safetensors"\nsources = "after"\nvalidation_share = 0.4\n'
    file.write_text(f'{head}control = ["before", "depth"]\n[grid]\nrank = [2, 4]\n')
    assert [one.data.control for one in read_sweep(file).runs.values()] == [
        (str(pairs / "before"), str(pairs / "depth"))
    ] * 2
    file.write_text(f'{head}[grid]\ncontrol = ["before", "depth"]\n')
    assert [one.data.control for one in read_sweep(file).runs.values()] == [
        (str(pairs / "before"),),
        (str(pairs / "depth"),),
    ]


def test_a_missing_control_ends_the_plan_before_anything_is_encoded(
    klein: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # its run is in ./runs
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.png").write_bytes((pairs / "before" / "a.png").read_bytes())
    audience = Audience()
    with pytest.raises(
        DataError, match=r"there is none for b.png, c.png; add a file of the same name to .*few, or choose"
    ):
        plan(asked(klein, pairs, control=(str(few),)), audience)
    assert "CaptionEncoded" not in audience.names()
    ready = plan(asked(klein, pairs, control=(str(few),), controls="optional"), audience)
    assert [len(one.conditioning.controls) for one in ready.data.samples] == [1, 0, 0]
    assert run(ready, Host()).losses


def test_the_command_line_trains_on_pairs(
    klein: dict[str, Path],
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = asked(klein, pairs, steps=1, control_dropout=0.0)
    monkeypatch.setattr(sys, "argv", spec.command())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    record = json.loads((tmp_path / "runs" / "cat-001" / "run.json").read_text())
    assert record["source"]["control"] == list(spec.data.control)
    out = capsys.readouterr().out
    assert f"control {pairs / 'before'} and {pairs / 'depth'}" in out.replace("\n", " ")
    assert f"--control {pairs / 'before' / 'a.png'} --control {pairs / 'depth' / 'a.png'} --prompt blue" in out


@pytest.mark.slow
def test_previews_show_the_control_and_the_target_and_so_does_the_report(
    klein: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    spec = asked(klein, pairs, steps=2, previews="blue | bluer", preview_steps=1, flip=False, control_dropout=0.0)
    result = run(plan(replace(spec, output=str(tmp_path / "run")), Host()), Host())
    assert result.folder is not None
    samples = result.folder / "samples"
    sizes = {}
    for path in samples.glob("*-?.png"):
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    assert {name: size for name, size in sizes.items() if not name.startswith(("base", "step", "strength"))} == {
        f"{stem}-{number}.png": size
        for stem, size in (("control", (32, 64)), ("control-2", (96, 32)), ("target", (64, 64)))
        for number in (1, 2)
    }
    assert sizes["base-1.png"] == sizes["step-000002-2.png"] == (32, 64), "the size of what it edits"
    page = (result.folder / "report.html").read_text()
    places = [page.index(f">{label}</th>") for label in ("control", "control 2", "target", "base model")]
    assert places == sorted(places)
    drawn_from = f"--control {samples / 'control-1.png'} --control {samples / 'control-2-1.png'} --prompt blue"
    assert drawn_from in page
