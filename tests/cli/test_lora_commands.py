"""`inspect`, `check` and `convert`, from the outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.cli import lora_files
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.model import Model
from lorasmith.formats.lora_file import load_lora, save_lora

Command = Callable[..., Any]
TINY = ("--model", "lorasmith-tiny")


@pytest.fixture
def dog(tmp_path: Path, tiny: Model) -> Path:
    """A LoRA on the attention of the built-in model."""
    path = tmp_path / "dog.safetensors"
    save_lora(path, lora(tiny), tiny.names, metadata={"ss_seed": "3", "prompt": "secret"})
    return path


def lora(tiny: Model, *, alpha: float = 2.0) -> AdapterState:
    adapters = {}
    for path, shape in tiny.names.weight_shapes.items():
        if ".attentions." in path and len(shape) > 1:
            ones = (1,) * (len(shape) - 2)
            tensors = {"down": torch.rand(4, *shape[1:]), "up": torch.rand(shape[0], 4, *ones)}
            adapters[ModuleRef(DENOISER, path)] = AdapterWeights("lora", tensors, alpha)
    return AdapterState(adapters)


def test_check_finds_nothing_in_a_good_file(lorasmith: Command, dog: Path, tiny: Model) -> None:
    ran = lorasmith("check", dog, *TINY)
    assert ran.code == 0, ran.out + ran.err
    modules = len(lora(tiny).adapters)
    assert f"{modules} modules in the layout of kohya / sd-scripts" in ran.out
    assert "compared with lorasmith-tiny" in ran.out
    assert "No faults, and every program applies all of it." in ran.out


def test_check_without_a_model_says_nothing_of_programs_that_only_the_model_tells(
    lorasmith: Command, dog: Path
) -> None:
    ran = lorasmith("check", dog)
    assert "No faults. Which programs apply all of it, only its model tells: --model MODEL." in ran.out
    assert "every program applies" not in ran.out


def test_check_names_faults_and_fixes_them(lorasmith: Command, dog: Path, tmp_path: Path) -> None:
    tensors = load_file(dog)
    base = next(key for key in tensors if key.endswith(".alpha")).removesuffix(".alpha")
    tensors[f"{base}.lora_up.weight"][0, 0] = float("nan")
    tensors["odd"] = torch.ones(2)
    save_file(tensors, tmp_path / "bad.safetensors")
    ran = lorasmith("check", "bad.safetensors", *TINY, "--fix", "good.safetensors")
    assert ran.code == 1
    assert f"Fault: {base}.lora_up.weight holds NaN or infinity, which spoils every picture; go back" in ran.out
    assert "Fault: odd has no name that LoRA files use" in ran.out
    assert f"Left out: {base}\nLeft out: odd\n2 findings repaired in good.safetensors, without 2 modules" in ran.out
    fixed = load_file(tmp_path / "good.safetensors")
    assert fixed.keys() == {key for key in tensors if not key.startswith(f"{base}.") and key != "odd"}
    assert all(torch.equal(fixed[key], tensors[key]) for key in fixed)
    assert lorasmith("check", "good.safetensors", *TINY).code == 0


def test_check_as_json(lorasmith: Command, dog: Path) -> None:
    found = json.loads(lorasmith("check", dog, "--json").out)
    assert found["is_fine"] is True
    assert found["layout"] == "kohya / sd-scripts"
    assert [finding["is_fault"] for finding in found["findings"]] == [False] * len(found["findings"])


def test_check_warns_of_layouts_that_some_programs_leave(lorasmith: Command, dog: Path) -> None:
    lorasmith("convert", dog, "--to", "comfy", *TINY)
    ran = lorasmith("check", "dog-comfy.safetensors", *TINY)
    assert ran.code == 0
    assert "Note: diffusers does not apply any of it as meant" in ran.out
    assert "convert it with `lorasmith convert --to kohya` for diffusers." in ran.out


@pytest.mark.parametrize("layout", ["peft", "portable"])
def test_convert(lorasmith: Command, dog: Path, tmp_path: Path, tiny: Model, layout: str) -> None:
    ran = lorasmith("convert", dog, "--to", layout, *TINY)
    assert ran.code == 0, ran.err
    target = tmp_path / (f"dog-{layout}" + ("" if layout == "peft" else ".safetensors"))
    assert ran.out.splitlines()[-1] == str(target)
    state = load_lora(target, tiny.names)
    assert state.adapters.keys() == lora(tiny).adapters.keys()
    assert state.metadata["ss_seed"] == "3"
    assert (tmp_path / "dog-peft" / "adapter_config.json").is_file() == (layout == "peft")


def test_convert_says_what_it_loses(lorasmith: Command, dog: Path, tmp_path: Path, tiny: Model) -> None:
    state = lora(tiny)
    size = tiny.names.weight_shapes["conv_norm_out"]
    state.differences[ModuleRef(DENOISER, "conv_norm_out")] = {"weight": torch.ones(size)}
    save_lora(dog, state, tiny.names)
    ran = lorasmith("convert", dog, "--to", "diffusers", *TINY)
    assert ran.code == 1
    assert "cannot be converted for diffusers without loss (conv_norm_out: diffusers has no differences" in ran.err
    ran = lorasmith("convert", dog, "--to", "diffusers", *TINY, "--lossy", "--private")
    assert ran.code == 0
    assert "Lost: conv_norm_out: diffusers has no differences of weights, norms and biases" in ran.out
    assert "prompt" not in load_lora(tmp_path / "dog-diffusers.safetensors", tiny.names).metadata


def test_inspect_shows_what_there_is(lorasmith: Command, dog: Path, tiny: Model) -> None:
    ran = lorasmith("inspect", dog)
    assert ran.code == 0
    pairs = [line.strip().split(maxsplit=1) for line in ran.out.splitlines()]
    shown = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    assert shown["Layout"].startswith("kohya × ")
    assert shown["Algorithm"] == f"lora × {len(lora(tiny).adapters)}"
    assert shown["Rank"].startswith("4 × ")
    assert len(shown["SHA256"]) == 64
    assert "Norm of the weight change by block" in ran.out
    assert float(shown["denoiser.mid_block"]) > 0
    assert shown["ss_seed"] == "3"


def test_names_with_brackets_are_printed_as_they_are(lorasmith: Command, tmp_path: Path) -> None:
    save_file({"[red]x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    assert "[red]x is damaged" in lorasmith("inspect", "x.safetensors").out
    assert "[red]x is damaged" in lorasmith("check", "x.safetensors").out


WRONG = {
    "check nothing": (("check", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
    "check text": (("check", "file.txt"), "file.txt is not a safetensors file"),
    "check truncated": (("check", "cut.safetensors"), "cut.safetensors is cut short"),
    "check with no model": (
        ("check", "dog.safetensors", "--model", "nothing.safetensors"),
        "nothing.safetensors does not",
    ),
    "fix over a file": (("check", "half.safetensors", "--fix", "dog.safetensors"), "dog.safetensors exists already"),
    "fix nothing": (
        ("check", "dog.safetensors", *TINY, "--fix", "new.safetensors"),
        "dog.safetensors has no faults, and there is nothing for --fix",
    ),
    "fix all away": (
        ("check", "half.safetensors", "--fix", "new.safetensors"),
        "nothing of half.safetensors would be left",
    ),
    "convert to what": (("convert", "dog.safetensors", "--to", "comfi"), "did you mean 'comfy'?"),
    "convert nothing": (("convert", "nowhere.safetensors", "--to", "comfy"), "nowhere.safetensors does not exist"),
    "convert over a file": (
        ("convert", "dog.safetensors", "--to", "comfy", "--output", "file.txt", *TINY),
        "file.txt exists already; choose another name with --output, or add --overwrite",
    ),
    "convert without a model": (("convert", "dog.safetensors", "--to", "comfy"), "name"),
    "convert for another model": (
        ("convert", "flux.safetensors", "--to", "comfy", *TINY),
        "looks like a LoRA for Flux.1",
    ),
    "convert an empty folder": (("convert", "empty", "--to", "comfy", *TINY), "must hold adapter_model.safetensors or"),
    "convert a damaged folder": (("convert", "damaged", "--to", "comfy", *TINY), "adapter_config.json must be a JSON"),
    "peft into a file": (
        ("convert", "dog.safetensors", "--to", "peft", "--output", "x.safetensors", *TINY),
        "this layout is a folder, and x.safetensors is the name of a file",
    ),
    "inspect text": (("inspect", "file.txt"), "file.txt is not a safetensors file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(lorasmith: Command, dog: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "file.txt").write_text("hello, this is text")
    (tmp_path / "cut.safetensors").write_bytes(dog.read_bytes()[:-4])
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(dog.read_bytes())
    (tmp_path / "damaged" / "adapter_config.json").write_text("nonsense")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "half.safetensors")
    save_file(
        {
            f"lora_unet_double_blocks_0_img_attn_proj.lora_{name}.weight": torch.zeros(shape)
            for name, shape in (("down", (4, 3072)), ("up", (3072, 4)))
        },
        tmp_path / "flux.safetensors",
    )
    before = sorted(tmp_path.rglob("*"))
    arguments, sentence = WRONG[case]
    ran = lorasmith(*arguments)
    assert ran.code == 1
    assert sentence in ran.err
    assert "Traceback" not in ran.err + ran.out
    assert len(ran.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_long_lists_of_a_file_end_in_their_number() -> None:
    assert lora_files._counts({"kohya": 192}) == "kohya × 192"
    assert lora_files._counts(dict.fromkeys(range(1600), 1)).endswith("499 × 1, and 1,100 more")
