"""Write example workflows: one for each model family, in API format and as an editor keeps it.

    python -m tools.example_graphs

The graphs of the families are the same but for loaders and sampling: load the parts under the file names of ComfyUI's
templates, and a folder of images with texts, train, save, plot, and draw a picture with the LoRA. That of a folder
trains on images of several sizes, in buckets. A test compares the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.core.folders import ASSETS
from lorasmith.nodes import load_nodes

EXAMPLES = ASSETS / "examples"
COLUMN, ROW, GAP = 420, 28, 80
PANEL = 200  # of the loss curve that our extension of the editor draws on Train LoRA

Graph = dict[str, dict[str, Any]]


def _loaders(unet: str, clips: tuple[str, ...], kind: str, vae: str) -> Graph:
    """Nodes 1 to 3: denoiser, text encoders, autoencoder."""
    several = {f"clip_name{number}": clip for number, clip in enumerate(clips, start=1)}
    encoder = {
        1: _node("CLIPLoader", "Text encoder", clip_name=clips[0], type=kind),
        2: _node("DualCLIPLoader", "Text encoders", **several, type=kind),
        3: _node("TripleCLIPLoader", "Text encoders", **several),
    }[len(clips)]
    return {
        "1": _node("UNETLoader", "Denoiser", unet_name=unet, weight_dtype="default"),
        "2": encoder,
        "3": _node("VAELoader", "Autoencoder", vae_name=vae),
    }


def _node(class_type: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


def _settings(*, steps: int, learning_rate: float, rank: int, batch_size: int = 1) -> dict[str, Any]:
    """Inputs of Train LoRA that have values, those of the node's defaults among them."""
    return {
        "batch_size": batch_size,
        "grad_accumulation_steps": 1,
        "steps": steps,
        "learning_rate": learning_rate,
        "rank": rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "bf16",
        "lora_dtype": "bf16",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": True,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": True,
        "bypass_mode": False,
    }


def _graph(
    loaders: Graph,
    sampling: Graph,
    *,
    parts: Mapping[str, list[Any]],
    learning_rate: float = 1e-4,
    megapixels: float = 1.0,
) -> Graph:
    """A training graph.

    Args:
        loaders: nodes that load the model.
        sampling: nodes that draw a picture, of which `60` gives its latents.
        parts: links to MODEL, CLIP and VAE.
        learning_rate: of the run.
        megapixels: size to which the images are scaled, in units of 1024².
    """
    model, clip, vae = parts["model"], parts["clip"], parts["vae"]
    return {
        **loaders,
        "10": _node("LoadImageTextDataSetFromFolder", "Images and texts", folder="fox"),
        "11": _node(
            "ImageScaleToTotalPixels",
            "Scale the images",
            image=["10", 0],
            upscale_method="lanczos",
            megapixels=megapixels,
            resolution_steps=32,
        ),
        "12": _node("MakeTrainingDataset", "Encode", images=["11", 0], vae=vae, clip=clip, texts=["10", 1]),
        "20": _node(
            "TrainLoraNode",
            "Train LoRA",
            model=model,
            latents=["12", 0],
            positive=["12", 1],
            **_settings(steps=500, learning_rate=learning_rate, rank=16),
        ),
        "21": _node("SaveLoRA", "Save the LoRA", lora=["20", 0], prefix="loras/fox", steps=["20", 2]),
        "22": _node("LossGraphNode", "Plot the loss", loss=["20", 1], filename_prefix="fox_loss"),
        "23": _node(
            "LoraModelLoader", "Model with LoRA", model=model, lora=["20", 0], strength_model=1.0, bypass=False
        ),
        "30": _node("CLIPTextEncode", "Prompt", text="a fox, on a white background", clip=clip),
        **sampling,
        "70": _node("VAEDecode", "Decode", samples=["60", 0], vae=vae),
        "71": _node("SaveImage", "Save the picture", images=["70", 0], filename_prefix="fox"),
    }


def _pairs(loaders: Graph, sampling: Graph) -> Graph:
    """A training graph on pairs: pale copies of the pictures are those before the edit, as there are no other examples.

    In `sampling`, `60` gives the latents, made from `31`, the instruction with a picture, or from a `30` of its own.
    """
    graph = _graph(loaders, sampling, parts=_APART)
    pale: dict[str, Any] = {"factor": 0.2}
    scaled = graph["11"]["inputs"]
    pairs = graph | {
        "10": _node("LoadImageDataSetFromFolder", "Pictures after the edit", folder="fox"),
        "13": _node(
            "AdjustContrast",
            "Pictures before the edit; for your own, use Load Image Pairs (from Folders)",
            images=["11", 0],
            **pale,
        ),
        "14": _node("PrimitiveString", "Instruction", value="give it strong colours"),
        "12": _node(
            "MakeTrainingPairs",
            "Encode",
            images=["11", 0],
            controls=["13", 0],
            vae=["3", 0],
            clip=["2", 0],
            texts=["14", 0],
        ),
        "24": _node("LoadImage", "Picture to edit", image="fox/fox_1.png"),
        "25": _node("AdjustContrast", "Pale, too", images=["24", 0], **pale),
        "26": _node("ImageScaleToTotalPixels", "Scale it", **{**scaled, "image": ["25", 0]}),
        "27": _node("VAEEncode", "Encode it", pixels=["26", 0], vae=["3", 0]),
        "30": _node("CLIPTextEncode", "Prompt", text=["14", 0], clip=["2", 0]),
        "31": _node("ReferenceLatent", "Prompt and picture", conditioning=["30", 0], latent=["27", 0]),
    }
    if "30" in sampling:
        del pairs["27"], pairs["31"]
    return pairs | sampling


def _seen() -> Graph:
    """Nodes 30 and 31: the instruction and none, of text encoders that see the picture."""
    given: dict[str, Any] = {"clip": ["2", 0], "vae": ["3", 0], "image1": ["26", 0]}
    return {
        "30": _node("TextEncodeQwenImageEditPlus", "Prompt and picture", prompt=["14", 0], **given),
        "31": _node("TextEncodeQwenImageEditPlus", "No instruction", prompt="", **given),
    }


def _ksampler(
    latent: str,
    *,
    negative: list[Any],
    positive: str = "30",
    model: str = "23",
    edge: int = 1024,
    length: int | None = None,
    **settings: Any,
) -> Graph:
    """Nodes 50 and 60: an empty latent of `edge`² pixels, of `length` frames if it has any, and KSampler."""
    frames = {} if length is None else {"length": length}
    settings = {"seed": 7, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", **settings}
    return {
        "50": _node(latent, "Size of the picture", width=edge, height=edge, **frames, batch_size=1),
        "60": _node(
            "KSampler",
            "Sample",
            model=[model, 0],
            **settings,
            positive=[positive, 0],
            negative=negative,
            latent_image=["50", 0],
            denoise=1.0,
        ),
    }


def _flux2(positive: str, negative: str) -> Graph:
    """Nodes 40 to 60: sampling of Flux.2 klein from two conditionings."""
    return {
        "40": _node("CFGGuider", "Guider", model=["23", 0], positive=[positive, 0], negative=[negative, 0], cfg=5.0),
        "41": _node("KSamplerSelect", "Sampler", sampler_name="euler"),
        "42": _node("Flux2Scheduler", "Sigmas", steps=20, width=1024, height=1024),
        "43": _node("RandomNoise", "Noise", noise_seed=7),
        "50": _node("EmptyFlux2LatentImage", "Size of the picture", width=1024, height=1024, batch_size=1),
        "60": _node(
            "SamplerCustomAdvanced",
            "Sample",
            noise=["43", 0],
            guider=["40", 0],
            sampler=["41", 0],
            sigmas=["42", 0],
            latent_image=["50", 0],
        ),
    }


def _tiny(training: Graph, prefix: str) -> Graph:
    """A graph that trains `lorasmith-tiny` on the pictures of a fox: `training` has its node 20 and what follows."""
    return {
        "1": _node("CheckpointLoaderSimple", "Checkpoint", ckpt_name="lorasmith-tiny.safetensors"),
        "10": _node("LoadImageTextDataSetFromFolder", "Images and texts", folder="fox"),
        "11": _node(
            "ImageScale",
            "Scale the images",
            image=["10", 0],
            upscale_method="lanczos",
            width=64,
            height=64,
            crop="center",
        ),
        "12": _node("MakeTrainingDataset", "Encode", images=["11", 0], vae=["1", 2], clip=["1", 1], texts=["10", 1]),
        **training,
        "21": _node("SaveLoRA", "Save the LoRA", lora=["20", 0], prefix=f"loras/{prefix}", steps=["20", 2]),
        "30": _node("CLIPTextEncode", "Prompt", text="a fox", clip=["1", 1]),
        "31": _node("CLIPTextEncode", "Negative prompt", text="", clip=["1", 1]),
        "50": _node("EmptyLatentImage", "Size of the picture", width=64, height=64, batch_size=1),
    }


def _train_tiny(title: str, **settings: Any) -> dict[str, Any]:
    values = {**_settings(steps=100, learning_rate=1e-3, rank=16, batch_size=2), **settings}
    return _node("TrainLoraNode", title, model=["1", 0], latents=["12", 0], positive=["12", 1], **values)


def _drawn(number: int, title: str, model: list[Any], prefix: str) -> Graph:
    """Nodes 60, 70 and 80 plus `number`: a picture of `model`."""
    sample, decode, save = (str(start + number) for start in (60, 70, 80))
    return {
        sample: _node(
            "KSampler",
            f"Sample {title}",
            model=model,
            seed=7,
            steps=20,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            positive=["30", 0],
            negative=["31", 0],
            latent_image=["50", 0],
            denoise=1.0,
        ),
        decode: _node("VAEDecode", f"Decode {title}", samples=[sample, 0], vae=["1", 2]),
        save: _node("SaveImage", f"Picture {title}", images=[decode, 0], filename_prefix=prefix),
    }


def _strengths(strengths: tuple[float, ...]) -> Graph:
    graph = {"20": _train_tiny("Train LoRA", steps=150)}
    for number, strength in enumerate(strengths):
        title = f"at strength {strength:g}"
        loader = str(40 + number)
        graph[loader] = _node(
            "LoraModelLoader",
            title.capitalize(),
            model=["1", 0],
            lora=["20", 0],
            strength_model=strength,
            bypass=False,
        )
        graph |= _drawn(number, title, [loader, 0], "strengths")
    return graph


def _with_clip(title: str, prefix: str, prompts: tuple[str, ...], **settings: Any) -> Graph:
    """Training that encodes texts, with previews of prompts separated by lines, drawn with both parts of the LoRA."""
    graph = {
        "20": _train_tiny(title, clip=["1", 1], previews="\n".join(prompts), **settings),
        "22": _node("LossGraphNode", "Plot the loss", loss=["20", 1], filename_prefix=f"{prefix}_loss"),
    }
    return {key: one for key, one in _tiny(graph, prefix).items() if key not in ("30", "31", "50")}


_APART = {"model": ["1", 0], "clip": ["2", 0], "vae": ["3", 0]}
_KLEIN = _loaders("flux-2-klein-base-4b.safetensors", ("qwen_3_4b.safetensors",), "flux2", "flux2-vae.safetensors")
_QWEN21 = _loaders(
    "qwen_image_2.1_bf16.safetensors",
    ("qwen3vl_8b_bf16.safetensors",),
    "qwen_image",
    "qwen_image_2.1_vae_bf16.safetensors",
)
_EMPTY: Graph = {"31": _node("CLIPTextEncode", "Negative prompt", text="", clip=["2", 0])}

GRAPHS: dict[str, Graph] = {
    "continue": _tiny(
        {
            "20": _train_tiny("Choose existing_lora, or train a new LoRA"),
            "22": _node("LossGraphNode", "Plot the loss", loss=["20", 1], filename_prefix="continued_loss"),
            "23": _node(
                "LoraModelLoader",
                "Model with LoRA",
                model=["1", 0],
                lora=["20", 0],
                strength_model=1.0,
                bypass=False,
            ),
            **_drawn(0, "with the LoRA", ["23", 0], "continued"),
        },
        "continued",
    ),
    "strengths": _tiny(_strengths((0.0, 0.5, 1.0, 1.5)), "strengths"),
    "preserve": _with_clip(
        "Train LoRA, and keep other animals as they were",
        "preserved",
        ("a fox", "a lion"),
        preserve="class",
        preserve_class="lion",
        trigger="fox",
    ),
    "text_encoder": _with_clip(
        "Train LoRA on the text encoder, too; Load LoRA applies both parts",
        "both_parts",
        ("a fox",),
        train_text_encoder=True,
    ),
    "sd15": _graph(
        {"1": _node("CheckpointLoaderSimple", "Checkpoint", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")},
        {
            "31": _node("CLIPTextEncode", "Negative prompt", text="", clip=["1", 1]),
            **_ksampler("EmptyLatentImage", negative=["31", 0], edge=512, steps=25, cfg=7.0, scheduler="normal"),
        },
        parts={"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]},
        megapixels=0.25,
    ),
    "sdxl": _graph(
        {"1": _node("CheckpointLoaderSimple", "Checkpoint", ckpt_name="sd_xl_base_1.0.safetensors")},
        {
            "31": _node("CLIPTextEncode", "Negative prompt", text="", clip=["1", 1]),
            **_ksampler("EmptyLatentImage", negative=["31", 0], steps=25, cfg=7.0, scheduler="normal"),
        },
        parts={"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]},
    ),
    "flux1": _graph(
        _loaders("flux1-dev.safetensors", ("clip_l.safetensors", "t5xxl_fp16.safetensors"), "flux", "ae.safetensors"),
        {
            "31": _node("FluxGuidance", "Guidance", conditioning=["30", 0], guidance=3.5),
            "32": _node("ConditioningZeroOut", "No negative prompt", conditioning=["30", 0]),
            **_ksampler("EmptySD3LatentImage", negative=["32", 0], positive="31"),
        },
        parts=_APART,
    ),
    "z_image": _graph(
        _loaders("z_image_bf16.safetensors", ("qwen_3_4b.safetensors",), "lumina2", "ae.safetensors"),
        {
            **_EMPTY,
            "40": _node("ModelSamplingAuraFlow", "Shift", model=["23", 0], shift=3.0),
            **_ksampler(
                "EmptySD3LatentImage",
                negative=["31", 0],
                model="40",
                steps=25,
                cfg=4.0,
                sampler_name="res_multistep",
            ),
        },
        parts=_APART,
    ),
    "flux2_klein": _graph(_KLEIN, {**_EMPTY, **_flux2("30", "31")}, parts=_APART),
    "flux2_klein_pairs": _pairs(
        _KLEIN,
        {
            "32": _node("ConditioningZeroOut", "No instruction", conditioning=["31", 0]),
            **_flux2("31", "32"),
        },
    ),
    "flux1_kontext_pairs": _pairs(
        _loaders(
            "flux1-dev-kontext_fp8_scaled.safetensors",
            ("clip_l.safetensors", "t5xxl_fp16.safetensors"),
            "flux",
            "ae.safetensors",
        ),
        {
            "32": _node("FluxGuidance", "Guidance", conditioning=["31", 0], guidance=2.5),
            "33": _node("ConditioningZeroOut", "No instruction", conditioning=["31", 0]),
            **_ksampler("EmptySD3LatentImage", negative=["33", 0], positive="32"),
        },
    ),
    "krea2": _graph(
        _loaders("krea2_raw.safetensors", ("qwen3vl_4b_bf16.safetensors",), "krea2", "qwen_image_vae.safetensors"),
        {**_EMPTY, **_ksampler("EmptySD3LatentImage", negative=["31", 0], steps=28, cfg=5.5)},
        parts=_APART,
    ),
    "ideogram4": _graph(
        _loaders(
            "ideogram4_fp8_scaled.safetensors",
            ("qwen3vl_8b_fp8_scaled.safetensors",),
            "ideogram4",
            "flux2-vae.safetensors",
        ),
        {
            **_EMPTY,
            "40": _node("ModelSamplingAuraFlow", "Shift", model=["23", 0], shift=2.0),
            **_ksampler("EmptyFlux2LatentImage", negative=["31", 0], model="40", steps=20, cfg=7.0),
        },
        parts=_APART,
    ),
    "ernie_image": _graph(
        _loaders("ernie-image.safetensors", ("ministral-3-3b.safetensors",), "flux2", "flux2-vae.safetensors"),
        {**_EMPTY, **_ksampler("EmptyFlux2LatentImage", negative=["31", 0], steps=20, cfg=4.0)},
        parts=_APART,
    ),
    "anima": _graph(
        _loaders(
            "anima-base-v1.0.safetensors",
            ("qwen_3_06b_base.safetensors",),
            "stable_diffusion",
            "qwen_image_vae.safetensors",
        ),
        {**_EMPTY, **_ksampler("EmptySD3LatentImage", negative=["31", 0], steps=30, cfg=4.0)},
        parts=_APART,
    ),
    "lumina2": _graph(
        _loaders("lumina_2_model_bf16.safetensors", ("gemma_2_2b_fp16.safetensors",), "lumina2", "ae.safetensors"),
        {
            **_EMPTY,
            "40": _node("ModelSamplingAuraFlow", "Shift", model=["23", 0], shift=6.0),
            **_ksampler(
                "EmptySD3LatentImage",
                negative=["31", 0],
                model="40",
                steps=30,
                cfg=4.0,
                sampler_name="res_multistep",
            ),
        },
        parts=_APART,
    ),
    "sd35": _graph(
        _loaders(
            "sd3.5_medium.safetensors",
            ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"),
            "sd3",
            "sd3_vae.safetensors",
        ),
        {
            **_EMPTY,
            **_ksampler("EmptySD3LatentImage", negative=["31", 0], cfg=4.0, scheduler="sgm_uniform"),
        },
        parts=_APART,
    ),
    "qwen_image": _graph(
        _loaders(
            "qwen_image_bf16.safetensors",
            ("qwen_2.5_vl_7b.safetensors",),
            "qwen_image",
            "qwen_image_vae.safetensors",
        ),
        {
            **_EMPTY,
            "40": _node("ModelSamplingAuraFlow", "Shift", model=["23", 0], shift=3.1),
            **_ksampler("EmptySD3LatentImage", negative=["31", 0], model="40", steps=50, cfg=4.0),
        },
        parts=_APART,
    ),
    "qwen_image21": _graph(
        _QWEN21,
        {**_EMPTY, **_ksampler("EmptySD3LatentImage", negative=["31", 0], steps=40, cfg=1.0)},
        parts=_APART,
    ),
    "qwen_image21_pairs": _pairs(
        _QWEN21, {**_seen(), **_ksampler("EmptySD3LatentImage", negative=["31", 0], steps=40, cfg=1.0)}
    ),
    "qwen_image_edit_pairs": _pairs(
        _loaders(
            "qwen_image_edit_2511_bf16.safetensors",
            ("qwen_2.5_vl_7b.safetensors",),
            "qwen_image",
            "qwen_image_vae.safetensors",
        ),
        {
            **_seen(),
            "40": _node("ModelSamplingAuraFlow", "Shift", model=["23", 0], shift=3.1),
            **_ksampler("EmptySD3LatentImage", negative=["31", 0], model="40", steps=40, cfg=4.0),
        },
    ),
    "chroma": _graph(
        _loaders("Chroma1-HD.safetensors", ("t5xxl_fp16.safetensors",), "chroma", "ae.safetensors"),
        {
            **_EMPTY,
            "40": _node("ModelSamplingAuraFlow", "Shift", model=["23", 0], shift=1.0),
            **_ksampler("EmptySD3LatentImage", negative=["31", 0], model="40", steps=26, cfg=3.5, scheduler="beta"),
        },
        parts=_APART,
    ),
    "wan": _graph(
        _loaders(
            "wan2.1_t2v_1.3B_fp16.safetensors",
            ("umt5_xxl_fp8_e4m3fn_scaled.safetensors",),
            "wan",
            "wan_2.1_vae.safetensors",
        ),
        {
            **_EMPTY,
            "40": _node("ModelSamplingSD3", "Shift", model=["23", 0], shift=8.0),
            **_ksampler(
                "EmptySD3LatentImage",
                negative=["31", 0],
                model="40",
                edge=640,
                steps=30,
                cfg=6.0,
                sampler_name="uni_pc",
            ),
        },
        parts=_APART,
        megapixels=0.4,
    ),
    "wan22_5b": _graph(
        _loaders(
            "wan2.2_ti2v_5B_fp16.safetensors",
            ("umt5_xxl_fp8_e4m3fn_scaled.safetensors",),
            "wan",
            "wan2.2_vae.safetensors",
        ),
        {
            **_EMPTY,
            "40": _node("ModelSamplingSD3", "Shift", model=["23", 0], shift=8.0),
            **_ksampler(
                "EmptySD3LatentImage", negative=["31", 0], model="40", edge=960, cfg=5.0, sampler_name="uni_pc"
            ),
        },
        parts=_APART,
        megapixels=0.88,
    ),
    "hunyuan_video15": _graph(
        _loaders(
            "hunyuanvideo1.5_720p_t2v_fp16.safetensors",
            ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "byt5_small_glyphxl_fp16.safetensors"),
            "hunyuan_video_15",
            "hunyuanvideo15_vae_fp16.safetensors",
        ),
        {
            **_EMPTY,
            "40": _node("ModelSamplingSD3", "Shift", model=["23", 0], shift=7.0),
            **_ksampler("EmptyHunyuanVideo15Latent", negative=["31", 0], model="40", edge=640, length=1, cfg=6.0),
        },
        parts=_APART,
        megapixels=0.4,
    ),
    "folder": {
        "1": _node("CheckpointLoaderSimple", "Checkpoint", ckpt_name="lorasmith-tiny.safetensors"),
        "10": _node("LoadImageTextDataSetFromFolder", "Images of any sizes, and texts", folder="fox"),
        "11": _node("MakeTrainingDataset", "Encode", images=["10", 0], vae=["1", 2], clip=["1", 1], texts=["10", 1]),
        "12": _node("ResolutionBucket", "Buckets of one size", latents=["11", 0], conditioning=["11", 1]),
        "20": _node(
            "TrainLoraNode",
            "Train LoRA",
            model=["1", 0],
            latents=["12", 0],
            positive=["12", 1],
            **_settings(steps=200, learning_rate=1e-3, rank=16, batch_size=2),
        ),
        "21": _node("SaveLoRA", "Save the LoRA", lora=["20", 0], prefix="loras/folder", steps=["20", 2]),
    },
}
"""Graphs in API format by the stem of their files."""


def as_editor(graph: Graph) -> dict[str, Any]:
    """The graph as an editor keeps it: nodes in columns by their distance from a loader."""
    nodes = load_nodes()
    depths: dict[str, int] = {}

    def depth(member: str) -> int:
        if member not in depths:
            sources = [value[0] for value in graph[member]["inputs"].values() if isinstance(value, list)]
            depths[member] = 1 + max((depth(source) for source in sources), default=-1)
        return depths[member]

    links: list[list[Any]] = []
    drawn: dict[str, dict[str, Any]] = {}
    heights: dict[int, int] = {}
    for order, (member, said) in enumerate(sorted(graph.items(), key=lambda item: (depth(item[0]), int(item[0])))):
        declared = nodes[said["class_type"]]
        sockets, widgets = [], []
        last = max(place for place, name in enumerate(declared.slots) if name in said["inputs"])
        for place, (name, slot) in enumerate(declared.slots.items()):
            has_widget = bool(slot.scalar_types) and not slot.force_input
            # Values are by position, so those that are left out before another one have their defaults.
            if place > last or (name not in said["inputs"] and not has_widget):
                continue
            value = said["inputs"].get(name, slot.default)
            if isinstance(value, list):
                source, output = value
                kind = nodes[graph[source]["class_type"]].outputs[output].type
                links.append([len(links) + 1, int(source), output, int(member), len(sockets), kind])
                drawn[source]["outputs"][output]["links"].append(len(links))
                sockets.append(
                    {
                        "name": name,
                        "type": kind,
                        "link": len(links),
                        **({"widget": {"name": name}} if has_widget else {}),
                    }
                )
                value = slot.default if slot.default is not None else 0
            if has_widget:
                widgets.append(value)
                if slot.extras.get("control_after_generate") or name == "seed":
                    widgets.append("fixed")
                if slot.extras.get("image_upload"):
                    widgets.append("image")  # its button
        column = depth(member)
        top, height = heights.get(column, 0), ROW * (2 + max(len(sockets), len(declared.outputs)) + len(widgets))
        height += PANEL * (said["class_type"] == "TrainLoraNode")
        heights[column] = top + height + GAP
        drawn[member] = {
            "id": int(member),
            "type": said["class_type"],
            "title": said["_meta"]["title"],
            "pos": [column * COLUMN, top],
            "size": [COLUMN - GAP, height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": sockets,
            "outputs": [{"name": one.name or one.type, "type": one.type, "links": []} for one in declared.outputs],
            "properties": {"Node name for S&R": said["class_type"]},
            "widgets_values": widgets,
        }
    return {
        "last_node_id": max(map(int, graph)),
        "last_link_id": len(links),
        "nodes": list(drawn.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def written() -> dict[Path, str]:
    """Text of every file by its path."""
    files = {}
    for stem, graph in GRAPHS.items():
        files[EXAMPLES / f"{stem}.json"] = json.dumps(graph, indent=2) + "\n"
        files[EXAMPLES / f"{stem}.ui.json"] = json.dumps(as_editor(graph)) + "\n"
    return files


if __name__ == "__main__":
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
