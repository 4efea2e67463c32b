"""Files of other families are refused by their headers, before any node of a graph runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flux_files import save_flux_files
from tiny_flux2 import KLEIN
from tiny_z_image import Z_IMAGE

from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, ModelError, NodeError
from lorasmith.core.folders import Folders
from lorasmith.families.base import FAMILIES
from lorasmith.families.model import Model
from lorasmith.nodes import load_nodes
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Executor, validate
from lorasmith.workflow.execution_events import Event, ExecutionFailed, ExecutionStarted
from lorasmith.workflow.graph import Graph
from tests.nodes.graphs import Prompt, api


@pytest.fixture(scope="module")
def folders(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Small files of Flux.1, Z-Image and Flux.2 klein, and a LoRA for the built-in model."""
    base = tmp_path_factory.mktemp("comfyui")
    save_flux_files(base)
    Z_IMAGE.saved(base)
    KLEIN.saved(base / "klein")
    for path in (base / "klein").rglob("*.safetensors"):
        path.rename(base / "models" / path.parent.name / f"klein-{path.name}")
    layer = ModuleRef("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    out, width = tiny.denoiser.module.get_submodule(layer.path).weight.shape
    state = AdapterState({layer: AdapterWeights("lora", {"down": torch.ones(2, width), "up": torch.ones(out, 2)}, 2.0)})
    (base / "models" / "loras").mkdir()
    Lora(state, tiny.names, torch.float32).save(base / "models" / "loras" / "tiny.safetensors")
    return Folders(base)


def flux(**replaced: dict[str, Any]) -> Prompt:
    """A graph that trains Flux.1 on encodings of its parts, as many habits of people as possible between them."""
    prompt = {
        "unet": api("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "clip": api(
            "DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"
        ),
        "vae": api("VAELoader", vae_name="ae.safetensors"),
        "shifted": api("ModelSamplingFlux", model=["unet", 0], max_shift=1.15, base_shift=0.5, width=64, height=64),
        "image": api("LoadImage", image="fox/fox_1.png"),
        "data": api("MakeTrainingDataset", images=["image", 0], vae=["vae", 0], clip=["clip", 0], texts="a fox"),
        "buckets": api("ResolutionBucket", latents=["data", 0], conditioning=["data", 1]),
        "guided": api("FluxGuidance", conditioning=["buckets", 1], guidance=3.5),
        "train": api("TrainLoraNode", model=["shifted", 0], latents=["buckets", 0], positive=["guided", 0],
                     existing_lora="[None]", training_dtype="bf16", learning_rate=1e-4),
        "save": api("SaveLoRA", lora=["train", 0], prefix="loras/fox"),
    }  # fmt: skip
    return prompt | replaced


def checked(prompt: Prompt, folders: Folders) -> None:
    load_nodes()
    graph: Graph = validate(prompt, folders)
    member = graph.nodes["train"]
    assert member.node.check is not None
    member.node.check(graph, member, folders)


CHECKPOINT = api("CheckpointLoaderSimple", ckpt_name="lorasmith-tiny.safetensors")


def clip(name: str, kind: str) -> dict[str, Any]:
    return api("CLIPLoader", clip_name=name, type=kind)


@pytest.mark.parametrize(
    ("replaced", "sentence"),
    [
        (
            {"clip": clip("clip_l.safetensors", "stable_diffusion")},
            r"Flux\.1 needs the text encoder t5xxl, .* \(its file is usually called t5xxl_fp16\.safetensors\)",
        ),
        (
            {"clip": clip("qwen_3_4b.safetensors", "lumina2")},
            r"qwen_3_4b\.safetensors is the text encoder qwen3, but Flux\.1 has clip_l \(usually clip_l\.safetensors\) "
            r"and t5xxl \(usually t5xxl_fp16\.safetensors\)",
        ),
        (
            {"vae": api("VAELoader", vae_name="klein-flux2-vae.safetensors")},
            r"klein-flux2-vae\.safetensors is an autoencoder of kind flux2 .*, but Flux\.1 has an autoencoder of kind "
            r".* \(its file is usually called ae\.safetensors\)",
        ),
        (
            {"vae": api("VAELoader", vae_name="t5xxl_fp16.safetensors")},
            r"t5xxl_fp16\.safetensors must hold an autoencoder, but is the text encoder t5xxl; give the file ae",
        ),
        (
            {
                "other": CHECKPOINT,
                "data": api(
                    "MakeTrainingDataset", images=["image", 0], vae=["other", 2], clip=["clip", 0], texts="a fox"
                ),
            },
            r"autoencoder of kind .* with 4 channels, but Flux\.1 has .* with 16 channels",
        ),
        (
            {
                "other": CHECKPOINT,
                "text": api("CLIPTextEncode", clip=["other", 1], text="a fox"),
                "guided": api("ConditioningCombine", conditioning_1=["buckets", 1], conditioning_2=["text", 0]),
            },
            r"must hold a text encoder, but is a model of the family Stable Diffusion 1\.x; give the file clip_l\.saf",
        ),
    ],
    ids=["lacking one", "another", "autoencoder", "no autoencoder", "of a checkpoint", "one of two conditionings"],
)
def test_parts_of_other_families_are_refused_with_the_file_to_get(
    folders: Folders, replaced: Prompt, sentence: str
) -> None:
    (folders.base / "models" / "vae").joinpath("t5xxl_fp16.safetensors").write_bytes(
        (folders.base / "models" / "text_encoders" / "t5xxl_fp16.safetensors").read_bytes()
    )
    with pytest.raises(ModelError, match=sentence):
        checked(flux(**replaced), folders)


def klein(kind: str) -> Prompt:
    return flux(
        unet=api("UNETLoader", unet_name=KLEIN_DENOISER, weight_dtype="default"),
        shifted=api("ModelSamplingAuraFlow", model=["unet", 0], shift=3.0),
        clip=clip("klein-qwen_3_4b.safetensors", kind),
        vae=api("VAELoader", vae_name="klein-flux2-vae.safetensors"),
    )


KLEIN_DENOISER = f"klein-{Path(KLEIN.files['transformer'][0]).name}"


def test_a_type_of_another_family_is_refused_with_the_right_one(folders: Folders) -> None:
    checked(klein("flux2"), folders)
    sentence = r"klein-qwen_3_4b\.safetensors must be .* \(Flux\.2 klein\), but type lumina2 is Z-Image; .* type flux2$"
    with pytest.raises(ModelError, match=sentence):
        checked(klein("lumina2"), folders)


def test_an_encoder_of_another_size_is_refused(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(FAMILIES["flux2-klein"]), "encoder_width", lambda *_: 4096)
    with pytest.raises(ModelError, match=r"is the text encoder qwen3 of width \d+, but .* needs one of width 4096"):
        checked(klein("flux2"), folders)


@pytest.mark.parametrize("name", ["existing_lora", "training_adapter"])
def test_a_lora_of_another_family_is_refused(folders: Folders, name: str) -> None:
    prompt = flux()
    prompt["train"]["inputs"][name] = "tiny.safetensors"
    with pytest.raises(LoraError, match=r"tiny\.safetensors looks like a LoRA for Stable Diffusion, .* flux1 model"):
        checked(prompt, folders)


@pytest.mark.parametrize(
    "replaced",
    [
        {},
        {
            "unet": CHECKPOINT,
            "shifted": api("LoraLoader", model=["unet", 0], clip=["unet", 1], lora_name="tiny.safetensors"),
            "data": api("MakeTrainingDataset", images=["image", 0], vae=["unet", 2], clip=["shifted", 1]),
        },
        {
            # Pictures of another model are no latents of it.
            "other": CHECKPOINT,
            "empty": api("EmptyLatentImage", width=64, height=64, batch_size=1),
            "image": api("VAEDecode", samples=["empty", 0], vae=["other", 2]),
        },
    ],
    ids=["its own parts", "one checkpoint", "pictures of another model"],
)
def test_what_fits_is_accepted(folders: Folders, replaced: Prompt) -> None:
    checked(flux(**replaced), folders)


def test_nothing_is_encoded_before_the_refusal(folders: Folders) -> None:
    load_nodes()
    events: list[Event] = []
    prompt = flux(clip=clip("qwen_3_4b.safetensors", "lumina2"))
    with pytest.raises(NodeError, match=r"^node train 'Train LoRA': .*qwen_3_4b\.safetensors is the text encoder"):
        Executor(folders, on_event=events.append).run(validate(prompt, folders))
    assert list(map(type, events)) == [ExecutionStarted, ExecutionFailed]
