"""The commands on LoRA files, from the outside: what they leave, what they say, and the page that describes them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.core.adapter_state import AdapterState, ModuleRef
from lorasmith.families.loading import load_model
from lorasmith.families.locating import built_in_models
from lorasmith.families.model import Model
from lorasmith.formats.container import read_safetensors
from lorasmith.formats.metadata import RANKS_ENTRY
from lorasmith.runs.library import train
from lorasmith.training.lora_handle import Lora
from tests.toolbox import cases
from tests.training.random_samples import of_one_size

Command = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs and models under the names that the page's examples use."""
    folder = tmp_path_factory.mktemp("made")
    layers = cases.shapes_of(tiny)
    rotated = {ref: shape for ref, shape in layers.items() if ref.path.endswith("to_q")}
    states = {
        "style": cases.lora_state(layers, seed=1, rank=8, alpha=4.0, size=0.02),
        "subject": cases.lora_state(layers, seed=2, rank=4, size=0.02),
        "turned": cases.lora_state(rotated, "oft", size=0.02),
    }
    for name, state in states.items():
        cases.saved(folder / f"{name}.safetensors", state, tiny.names)
    cases.saved(folder / "style-comfy.safetensors", states["style"], tiny.names, "comfy")
    shutil.copy(built_in_models()["lorasmith-tiny"], folder / "sd15.safetensors")
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    shapes = {f"{layer}.lora_down.weight": (4, 3072), f"{layer}.lora_up.weight": (3072, 4)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "flux.safetensors")
    tuned, metadata = read_safetensors(folder / "sd15.safetensors")
    name = next(name for name in tuned if name.endswith("to_q.weight"))
    save_file({**tuned, name: tuned[name] + 1}, folder / "tuned.safetensors", metadata)
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """The folder that the page's examples are run in; commands replace files and change none."""
    return Path(shutil.copytree(made, tmp_path, copy_function=os.link, dirs_exist_ok=True))


BANDS = ("dog/dog.safetensors", "--model", "sd15.safetensors")


def run_with_averages(folder: Path) -> None:
    """A run of a T-LoRA that has saved averages, in `dog`."""
    model = load_model(built_in_models()["lorasmith-tiny"])
    settings: dict[str, Any] = {"steps": 4, "rank": 3, "targets": "*.attn2.to_q", "tlora": "plain", "previews": ""}
    train(model, of_one_size(model), output=folder / "dog", title="dog", post_hoc_ema=2, **settings)


@pytest.mark.slow
def test_the_commands_of_the_page_run(lorasmith: Command, files: Path) -> None:
    commands = [shlex.split(line.strip())[1:] for line in re.findall(r"^    (lorasmith .*)$", PAGE, flags=re.MULTILINE)]
    assert {command[0] for command in commands} == {"merge", "resize", "bands", "average", "extract", "diff"}
    run_with_averages(files)
    for command in commands:
        ran = lorasmith(*command)
        differs = command[0] == "diff" and "--weights-only" not in command
        assert ran.code == differs, (command, ran.out, ran.err)
        assert not ran.err
    assert (files / "style-rank4.safetensors").is_file()


@pytest.mark.slow
def test_the_python_of_the_page_runs(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert code is not None
    monkeypatch.chdir(files)
    exec(compile(code[1], "tools.md", "exec"), {})
    kept, distance = capsys.readouterr().out.splitlines()
    assert kept.endswith("kept")
    assert 0 < float(distance) < 1


def test_bands_and_average_say_what_they_made(lorasmith: Command, files: Path) -> None:
    run_with_averages(files)
    ran = lorasmith("bands", *BANDS)
    assert ran.code == 0, ran.err
    assert re.search(r"dog-band02\.safetensors +0\.\d+ +\d+", ran.out), ran.out
    assert (files / "dog" / "dog-bands" / "workflow.json").is_file()
    ran = lorasmith("bands", *BANDS, "--count", 2, "--overwrite")
    assert "--count has more bands" in ran.out + ran.err
    assert json.loads(lorasmith("bands", *BANDS, "--json", "--overwrite").out)["is_exact"]
    assert json.loads(lorasmith("average", "dog", "--json", "--output", "a.safetensors").out)["missing"] == []
    ran = lorasmith("average", "dog", "--ema", 0.1)
    assert ran.code == 0, ran.err
    assert "Average up to step 4, of 4 files; the weights of its steps are 0.0% off" in ran.out
    next((files / "dog" / "averages").glob("*step00000002-ema0.10*")).unlink()
    ran = lorasmith("average", "dog", "--ema", 0.25, "--output", "long.safetensors")
    assert "Averages of step 2 are missing" in ran.out + ran.err
    assert "choose another length" in ran.out + ran.err
    ran = lorasmith("merge", "dog/dog.safetensors", "--into", "sd15.safetensors", "--output", "whole.safetensors")
    assert "is a T-LoRA, of which all ranks are used" in " ".join((ran.out + ran.err).split())
    ran = lorasmith("resize", "dog/dog.safetensors", "--rank", 2)
    assert "is a T-LoRA; the new file uses all of its ranks" in " ".join((ran.out + ran.err).split())
    assert RANKS_ENTRY not in Lora.load(files / "dog" / "dog-rank2.safetensors").metadata
    ran = lorasmith("inspect", "dog/dog.safetensors")
    assert "1 of the ranks in pure noise" in " ".join(ran.out.split())


def test_training_says_how_comfyui_has_the_ranks(lorasmith: Command, photos: Path) -> None:
    quick = ("--model", "lorasmith-tiny", "--steps", 1, "--targets", "*.attn2.to_q", "--no-previews")
    ran = lorasmith("train", photos, *quick, "--rank", 4, "--tlora", "plain")
    assert ran.code == 0, ran.err
    assert re.search(r"For ComfyUI:\s+lorasmith bands \S+\.safetensors", ran.out), ran.out
    assert "T-LoRA" not in lorasmith("train", photos, *quick, "--fresh").out


def test_merge_says_what_it_made(lorasmith: Command, files: Path, tiny: Model) -> None:
    ran = lorasmith("merge", "style.safetensors:0.5", "subject.safetensors:-1", "--output", "out.safetensors")
    assert ran.code == 0, ran.err
    state = Lora.load(files / "out.safetensors", tiny).state
    assert f"{len(state.adapters)} modules, rank 12 × {len(state.adapters)}: exact" in ran.out
    ran = lorasmith("merge", "style.safetensors", "subject.safetensors", "--rank", 2, "--output", "small.safetensors")
    assert re.search(r"rank 2 × \d+: \d+\.\d\d% of the energy", ran.out), ran.out
    ran = lorasmith("merge", "style.safetensors", "--dtype", "fp16", "--output", "half.safetensors")
    assert {t.dtype for t in load_file(files / "half.safetensors").values()} == {torch.float16}


def test_merge_into_says_what_it_left_out(lorasmith: Command, files: Path) -> None:
    tensors = load_file(files / "style.safetensors")
    extra = {f"lora_te2_x.lora_{name}.weight": torch.ones(2, 2) for name in ("down", "up")}
    save_file({**tensors, **extra}, files / "more.safetensors")
    ran = lorasmith("merge", "more.safetensors", "--into", "sd15.safetensors", "--output", "out.safetensors")
    assert ran.code == 0, ran.err
    assert "2 tensors of more.safetensors, such as lora_te2_x.lora_down.weight, match no module" in ran.out
    assert "modules changed" in ran.out


def test_resize_shows_blocks_or_modules(lorasmith: Command, files: Path) -> None:
    ran = lorasmith("resize", "style.safetensors", "--rank", 2)
    assert ran.code == 0, ran.err
    assert re.search(r"denoiser\.mid_block +8 +2 +\d+\.\d\d%", ran.out), ran.out
    assert re.search(r"modules kept \d+\.\d\d% of the energy in all", ran.out)
    assert "style-rank2.safetensors" in ran.out
    ran = lorasmith("resize", "style.safetensors", "--energy", 0.8, "--modules")
    assert "lora_unet_mid_block_attentions_0_proj_in" in ran.out
    assert (files / "style-energy0.8.safetensors").is_file()


def test_diff_says_what_differs(lorasmith: Command, files: Path, tiny: Model) -> None:
    same = lorasmith("diff", "style.safetensors", "style.safetensors")
    assert (same.code, same.err) == (0, "")
    assert "modules in both: the same" in same.out
    ran = lorasmith("diff", "style.safetensors", "turned.safetensors")
    assert ran.code == 1
    for text in (
        "Only in style.safetensors",
        "LoRA, rank 8, alpha 4 against OFT",
        "--model compares their effect",
        "all",
    ):
        assert text in ran.out, text
    assert "Metadata ss_output_name: style against turned" in ran.out


def test_diff_as_json(lorasmith: Command, files: Path) -> None:
    ran = lorasmith("diff", "style.safetensors", "subject.safetensors", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["same"], found["kind"]) == (1, False, "LoRA")
    assert found["overall"]["distance"] > 0.5
    assert ["LoRA, rank 8, alpha 4", "LoRA, rank 4, alpha 2"] in found["settings"].values()


OUT = ("--output", "out.safetensors")
WRONG = {
    "strength": (("merge", "style.safetensors:much", *OUT), "must be a number, got 'much'"),
    "no LoRA": (("merge", "none.safetensors", *OUT), "none.safetensors does not exist"),
    "rank 0": (("merge", "style.safetensors", "--rank", 0, *OUT), "a rank must be at least 1, got 0"),
    "strength 0": (("merge", "style.safetensors:0", *OUT), "all of these are 0"),
    "mixed families": (("merge", "style.safetensors", "flux.safetensors", *OUT), "must be for the same family"),
    "mixed layouts": (("merge", "style.safetensors", "style-comfy.safetensors", *OUT), "name it with --model"),
    "not additive": (("merge", "style.safetensors", "turned.safetensors", *OUT), "by OFT; add --rank and --model"),
    "no weights": (
        ("merge", "style.safetensors", "turned.safetensors", "--rank", 4, *OUT), "depends on the model's weights",
    ),
    "target exists": (("merge", "style.safetensors", "--output", "subject.safetensors"), "exists already"),
    "no file's name": (("merge", "style.safetensors", "--output", "out"), "must be a file whose name ends in"),
    "dtype": (("merge", "style.safetensors", "--dtype", "int8", *OUT), "a dtype is one of fp32, bf16, fp16"),
    "into with rank": (
        ("merge", "style.safetensors", "--into", "sd15.safetensors", "--rank", 4, *OUT), "--rank has no effect",
    ),
    "into nothing": (("merge", "style.safetensors", "--into", "none.safetensors", *OUT), "does not exist"),
    "into another family": (
        ("merge", "flux.safetensors", "--into", "sd15.safetensors", *OUT), "looks like a LoRA for Flux.1",
    ),
    "into a LoRA": (("merge", "style.safetensors", "--into", "subject.safetensors", *OUT), "is a LoRA, not a base"),
    "resize to nothing": (("resize", "style.safetensors"), "give --rank, such as 8, or --energy"),
    "resize to rank 0": (("resize", "style.safetensors", "--rank", 0), "a rank must be at least 1, got 0"),
    "resize to energy 2": (("resize", "style.safetensors", "--energy", 2), "at most 1, such as 0.95, got 2"),
    "resize up": (("resize", "style.safetensors", "--rank", 64), "its largest is 8; give a smaller one"),
    "resize OFT": (("resize", "turned.safetensors", "--rank", 2), "by OFT, which has no rank to choose"),
    "resize a model": (("resize", "sd15.safetensors", "--rank", 2), "is not a LoRA"),
    "extract of one": (
        ("extract", "--base", "sd15.safetensors", "--tuned", "sd15.safetensors"), "does not differ from",
    ),
    "extract of no model": (("extract", "--base", "sd15.safetensors", "--tuned", "none"), "does not exist"),
    "extract of a LoRA": (
        ("extract", "--base", "sd15.safetensors", "--tuned", "style.safetensors"), "is a LoRA, not a base model",
    ),
    "extract layout": (
        ("extract", "--base", "sd15.safetensors", "--tuned", "tuned.safetensors", "--layout", "koya"), "mean 'kohya'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(lorasmith: Command, files: Path, case: str) -> None:
    before = {path.name for path in files.iterdir()}
    arguments, sentence = WRONG[case]
    ran = lorasmith(*arguments)
    assert ran.code == 1
    assert sentence in ran.err
    assert "Traceback" not in ran.err + ran.out
    assert {path.name for path in files.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("style.safetensors", "none.safetensors"), "none.safetensors does not exist"),
        (("style.safetensors", "sd15.safetensors"), "style.safetensors is a LoRA and sd15.safetensors is a checkpoint"),
        (("style.safetensors", "style-comfy.safetensors"), "name it with --model"),
    ],
)
def test_what_cannot_be_compared_has_its_own_status(
    lorasmith: Command, files: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    ran = lorasmith("diff", *arguments)
    assert ran.code == 2
    assert sentence in ran.err
    assert "Traceback" not in ran.err + ran.out


def test_overwrite_replaces(lorasmith: Command, files: Path) -> None:
    before = (files / "subject.safetensors").read_bytes()
    assert (
        lorasmith("resize", "style.safetensors", "--rank", 2, "--output", "subject.safetensors", "--overwrite").code
        == 0
    )
    assert (files / "subject.safetensors").read_bytes() != before


def test_a_bias_without_a_place_is_a_sentence(lorasmith: Command, files: Path, tiny: Model) -> None:
    ref = ModuleRef("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    width = tiny.names.weight_shapes[ref.path][0]
    cases.saved(files / "bias.safetensors", AdapterState({}, {ref: {"bias": torch.ones(width)}}), tiny.names)
    ran = lorasmith("merge", "bias.safetensors", "--into", "sd15.safetensors", "--output", "out.safetensors")
    assert ran.code == 1
    assert "a LoRA must not add biases to layers without one, but this one does to mid_block" in ran.err
