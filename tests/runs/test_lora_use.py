from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lorasmith.runs.sidecars import LoraUse, use_of


def use(**changes: str) -> LoraUse:
    facts = {
        "trigger": "sks dog",
        "prompt": "sks dog",
        "model": "/models/sd15.safetensors",
        "model_title": "sd15",
        "family": "sd1",
    }
    return use_of(Path("/runs/dog v1.2.safetensors"), **{**facts, **changes})


def test_every_program_gets_what_it_needs() -> None:
    found = use()
    assert (found.facts["File"], found.facts["Trigger"]) == ("dog v1.2.safetensors", "sks dog")
    assert found.programs["A1111, Forge"][1] == "<lora:dog v1.2:1> sks dog"
    assert "models/loras" in found.programs["ComfyUI"][0]


@pytest.mark.parametrize(
    ("model", "family", "call"),
    [
        ("/models/sd15.safetensors", "sd1", "StableDiffusionPipeline.from_single_file('/models/sd15.safetensors')"),
        ("owner/xl", "sdxl", "StableDiffusionXLPipeline.from_pretrained('owner/xl')"),
        ("owner/odd", "unknown", "DiffusionPipeline.from_pretrained('owner/odd')"),
    ],
)
def test_the_code_for_diffusers_is_code(model: str, family: str, call: str) -> None:
    said, code = use(model=model, family=family).programs["diffusers"]
    assert "packages diffusers and peft" in said  # which load_lora_weights needs
    assert call in code
    assert "adapter_name='dog_v1_2'" in code
    ast.parse(code)


def test_what_a_stranger_named_stays_a_literal() -> None:
    hostile = "'); import os; os.system('x') #\n"
    _, code = use(prompt=hostile, model=hostile).programs["diffusers"]
    assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import)]


def test_the_built_in_model_is_nothing_for_diffusers() -> None:
    found = use(model="lorasmith-tiny", trigger="")
    assert "diffusers" not in found.programs and found.facts["Trigger"].startswith("none")


def test_what_pipelines_cannot_load_from_one_file_is_named() -> None:
    use = use_of(
        Path("a.safetensors"), trigger="", prompt="a fox", model="wan.safetensors", model_title="", family="wan"
    )
    code = use.programs["diffusers"][1]
    assert "WanPipeline.from_pretrained('the diffusers folder or hub id of wan')" in code
    assert "export_to_video" in code and "frames[0]" in code
    ast.parse(code)


@pytest.mark.parametrize(
    ("pipeline", "family", "controls", "call", "images"),
    [
        ("FluxKontextPipeline", "flux1", 1, "FluxKontextPipeline", "image=load_image('before.png'), "),
        ("", "flux1", 0, "FluxPipeline", ""),
        ("exit()", "flux1", 0, "FluxPipeline", ""),
        (
            "Flux2KleinPipeline",
            "flux2-klein",
            2,
            "Flux2KleinPipeline",
            "image=[load_image('before.png'), load_image('before1.png')], ",
        ),
    ],
)
def test_edit_models_get_their_pipeline_and_pictures(
    pipeline: str, family: str, controls: int, call: str, images: str
) -> None:
    facts = {"trigger": "", "prompt": "make it blue", "model": "owner/edit", "model_title": "", "family": family}
    programs = use_of(Path("a.safetensors"), **facts, pipeline=pipeline, controls=controls).programs
    _, code = programs["diffusers"]
    ast.parse(code)
    assert f"pipeline = {call}.from_pretrained" in code
    assert f"pipeline({images}prompt='make it blue')" in code
    assert ("import load_image" in code) == ("Set Reference Latent" in programs["ComfyUI"][0]) == bool(controls)
