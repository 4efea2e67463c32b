"""The commands, from the outside: what they say, what they leave behind, and a sentence for all that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from lorasmith.cli.flags import split_strength
from lorasmith.core.errors import OptionError
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.training.lora_handle import Lora

Command = Callable[..., Any]
QUICK = ("--model", "lorasmith-tiny", "--steps", 2, "--rank", 2, "--targets", "attention", "--no-previews")


def test_train_says_what_it_will_do_and_where_everything_is(
    lorasmith: Command, photos: Path, tmp_path: Path, tiny: Model
) -> None:
    (photos / "broken.png").write_text("not a picture")
    ran = lorasmith("train", photos, *QUICK, "--trigger", "sks cat", "--batch-size", 2)
    assert ran.code == 0, ran.err
    for text in (
        "4 images",
        "skipped broken.png",
        "2 have no caption; the trigger 'sks cat' is used",
        "latin-1",
        "lorasmith-tiny (Stable Diffusion 1.x)",
        "rank 2, alpha 2, on attention",
        "Recipe balanced for a subject (all pictures are of sks cat;",
        "2 × batch 2 = 4 samples, 4 in an epoch = 1.0 epochs",
        "lorasmith generate --model lorasmith-tiny",
    ):
        assert text in ran.out, text
    folder = tmp_path / "runs" / "photos-001"
    lora = Lora.load(folder / "photos.safetensors", tiny)
    assert len(lora.state.adapters) >= 56
    assert lora.state.metadata["modelspec.trigger_phrase"] == "sks cat"
    with Image.open(folder / "loss.png") as plot:
        assert plot.size[0] > 500
    captions = {sample["caption"] for sample in json.loads((folder / "run.json").read_text())["samples"]}
    assert captions == {"sks cat, a cat on a mat", "sks cat, a café", "sks cat"}


def test_a_file_of_settings_names_the_second_expert(lorasmith: Command, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(
        f'model = "{BUILT_IN}"\nlow_noise_model = "{BUILT_IN}"\nclass_prompt = "a cat"\n'
    )
    ran = lorasmith("train", photos, "--config", "two.toml")
    assert ran.code == 1 and "class_images must be given with low_noise_model" in ran.err


def test_a_lora_that_applies_in_part_is_said_and_refused_if_strict(
    lorasmith: Command, photos: Path, tmp_path: Path, tiny: Model
) -> None:
    shapes = [(path, shape) for path, shape in tiny.names.weight_shapes.items() if path.endswith("attn2.to_q")]
    tensors = {}
    for number, (path, (rows, columns)) in enumerate(shapes):
        base = f"lora_unet_{'new_' * (number < 2)}{path.replace('.', '_')}"
        tensors |= {f"{base}.lora_down.weight": torch.ones(1, columns), f"{base}.lora_up.weight": torch.ones(rows, 1)}
    save_file(tensors, tmp_path / "part.safetensors")
    draw = ("generate", "--model", "lorasmith-tiny", "--lora", "part.safetensors:0.1", "--prompt", "x", "--steps", 1)
    said = f"lorasmith-tiny leaves out 2 of {len(shapes)} parts of part.safetensors: 2 under unknown names (lora_unet_"
    drawn = lorasmith(*draw)
    assert (drawn.code, f"Note: {said}" in drawn.out) == (0, True), drawn
    ran = lorasmith(*draw, "--strict")
    assert (ran.code, said in ran.err) == (1, True), ran
    for option in ("--existing-lora", "--training-adapter"):
        ran = lorasmith("train", photos, *QUICK, option, "part.safetensors", "--strict")
        assert (ran.code, said in ran.err) == (1, True), ran
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "part.safetensors")
    ran = lorasmith(*draw)
    assert (ran.code, "must hold finite numbers" in ran.err) == (1, True), ran
    assert len(list((tmp_path / "output").iterdir())) == 1


def test_run_executes_a_workflow_with_overrides(lorasmith: Command, tmp_path: Path) -> None:
    workflow = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "lorasmith-tiny.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 1]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "seed": 1, "steps": 20, "cfg": 3.0, "sampler_name": "euler",
                "scheduler": "normal", "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0],
                "denoise": 1.0,
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "cat"}},
        "7": {"class_type": "SomebodysNode", "inputs": {"images": ["5", 0]}},
    }  # fmt: skip
    (tmp_path / "graph.json").write_text(json.dumps(workflow))
    (tmp_path / "base").mkdir()
    ran = lorasmith("run", "graph.json", "--set", "4.steps=2", "--base-dir", "base")
    assert ran.code == 0, ran.err
    picture = tmp_path / "base" / "output" / "cat_00001_.png"
    assert picture.name in ran.out
    assert (
        "left out, as their classes are unknown and no output needs them: node 7 'SomebodysNode'" in ran.out + ran.err
    )
    with Image.open(picture) as image:
        assert json.loads(image.info["prompt"])["4"]["inputs"]["steps"] == 2


@pytest.mark.slow
def test_run_lists_the_examples_and_runs_one(lorasmith: Command) -> None:
    listed = lorasmith("run", "example:")
    assert listed.code == 0
    first, *_, last = listed.out.splitlines()
    assert first.startswith("example:single_subject") and "needs" not in first
    assert "example:wan22_5b" in last and "; needs wan2.2_ti2v_5B_fp16.safetensors, " in last
    ran = lorasmith("run", "example:folder", "--set", "20.steps=1", "--set", "20.targets=*.attn2.to_q")
    assert ran.code == 0, ran.err
    assert "folder_1_steps_00001_.safetensors" in ran.out


@pytest.mark.parametrize("kind", ["ui.json", "png", "safetensors"])
def test_run_takes_a_workflow_from_the_editor_a_picture_or_a_lora(
    lorasmith: Command, tmp_path: Path, kind: str
) -> None:
    editor = {
        "nodes": [
            {"id": 1, "type": "PrimitiveString", "title": "Words", "widgets_values": ["a fox"]},
            {"id": 2, "type": "PreviewAny", "inputs": [{"name": "source", "type": "*", "link": 1}]},
        ],
        "links": [[1, 1, 0, 2, 0, "STRING"]],
        "version": 0.4,
    }
    file = tmp_path / f"graph.{kind}"
    if kind == "png":
        entries = PngInfo()
        entries.add_text("workflow", json.dumps(editor))
        Image.new("L", (4, 4)).save(file, pnginfo=entries)
    elif kind == "safetensors":
        save_file({"a": torch.zeros(1)}, file, {"workflow": json.dumps(editor)})
    else:
        file.write_text(json.dumps(editor))
    assert "a fox" in lorasmith("run", file).out
    ran = lorasmith("run", file, "--set", "Words.value=a wolf")
    assert ran.code == 0, ran.err
    assert "a wolf" in ran.out


WRONG = {
    "no model": (("train", "photos"), "--model must be a .safetensors or .gguf file"),
    "no folder": (("train", "nowhere", *QUICK), "nowhere"),
    "empty folder": (("train", "empty", *QUICK), "empty"),
    "bad pictures only": (("train", "bad", *QUICK), "bad"),
    "rank": (("train", "photos", *QUICK, "--rank", 500), "rank must be between 1 and 128, got 500"),
    "optimizer": (("train", "photos", *QUICK, "--optimizer", "Adm"), "did you mean 'Adam'?"),
    "targets": (("train", "photos", *QUICK, "--targets", "*.nope"), "matches none"),
    "name": (("train", "photos", *QUICK, "--name", "../cat"), "name must be a file name without folders"),
    "device": (("train", "photos", *QUICK, "--device", "gpu"), "device must be one that is here (cpu"),
    "missing checkpoint": (("train", "photos", "--model", "sd15.safetensors"), "sd15.safetensors does not exist"),
    "no such model": (("train", "photos", "--model", "sd15"), "there is no model at sd15"),
    "pickled checkpoint": (("train", "photos", "--model", "old.ckpt"), "old.ckpt"),
    "truncated checkpoint": (("train", "photos", "--model", "cut.safetensors"), "cut.safetensors"),
    "unknown architecture": (("train", "photos", "--model", "odd.safetensors"), "of no supported architecture"),
    "LoRA as model": (("train", "photos", "--model", "flux_lora.safetensors"), "is a LoRA, not a base model"),
    "output is a file": (("train", "photos", *QUICK, "--output", "file.txt"), "must be a folder but is a file"),
    "LoRA of another family": (
        ("generate", "--model", "lorasmith-tiny", "--prompt", "x", "--lora", "flux_lora.safetensors"),
        "looks like a LoRA for",
    ),
    "LoRA strength": (
        ("generate", "--model", "lorasmith-tiny", "--prompt", "x", "--lora", "a.safetensors:strong"),
        "a LoRA's strength must be a number, got 'strong'",
    ),
    "width": (
        ("generate", "--model", "lorasmith-tiny", "--prompt", "x", "--width", 100),
        "width must be a multiple of 16",
    ),
    "dtype": (("generate", "--model", "lorasmith-tiny", "--prompt", "x", "--dtype", "int8"), "a dtype is one of fp32"),
    "sampler": (("generate", "--model", "lorasmith-tiny", "--prompt", "x", "--sampler", "eular"), "euler"),
    "no workflow": (("run", "nowhere.json"), "nowhere.json cannot be read"),
    "not JSON": (("run", "file.txt"), "JSON"),
    "editor format": (("run", "ui.json"), "a workflow needs an output node"),
    "unknown example": (("run", "example:singel_subject"), "did you mean 'single_subject'?"),
    "no workflow in a picture": (("run", "photos/1.png"), "carries no workflow"),
    "no workflow in a LoRA": (("run", "flux_lora.safetensors"), "carries no workflow"),
    "override of nothing": (("run", "unknown.json", "--set", "Sampler.steps=3"), "no node 'Sampler'"),
    "unknown node": (("run", "unknown.json"), "KSampler"),
    "not a LoRA": (("inspect", "file.txt"), "file.txt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(lorasmith: Command, photos: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.png").write_text("not a picture")
    Image.new("RGB", (1, 1)).save(tmp_path / "bad" / "dot.png")
    Image.new("RGB", (20_000, 20)).save(tmp_path / "bad" / "line.png")
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    whole = (tmp_path / "odd.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    save_file(
        {
            f"lora_unet_double_blocks_{i}_img_attn_proj.lora_{name}.weight": torch.zeros(shape)
            for i in range(4)
            for name, shape in (("down", (4, 3072)), ("up", (3072, 4)))
        },
        tmp_path / "flux_lora.safetensors",
    )
    (tmp_path / "ui.json").write_text(json.dumps({"nodes": [], "links": [], "version": 0.4}))
    (tmp_path / "unknown.json").write_text(json.dumps({"1": {"class_type": "KSamplr", "inputs": {}}}))
    arguments, sentence = WRONG[case]
    ran = lorasmith(*arguments)
    assert ran.code == 1
    assert sentence in ran.err
    assert "Traceback" not in ran.err + ran.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:2", (r"C:\loras\a.safetensors", 2.0)),
    ],
)
def test_strengths_are_split_off(text: str, expected: tuple[str, float]) -> None:
    path, strength = split_strength(text)
    assert (str(path), strength) == expected


def test_a_strength_that_is_no_number() -> None:
    with pytest.raises(OptionError, match="must be a number"):
        split_strength("a.safetensors:much")
