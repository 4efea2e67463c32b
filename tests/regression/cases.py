"""Ten short training runs, described through the public API alone, so that two versions of the package can run them.

    python -m tests.regression.cases FOLDER CASE...     run the cases, write FOLDER/CASE.pt for each

Everything that a case reads is made here from fixed seeds (pictures, captions, a Flux.1 file, conditioning); only the
built-in model comes with the version that is run. `compare` runs the cases on two versions and compares what they
return.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorasmith as ls
from tests.peers import models

if TYPE_CHECKING:
    from lorasmith.data.dataset import EncodedDataset

_CAPTIONS = ("a cat", "a dog on a blue background", "", "(a bus:1.3)", "a lion", "a penguin, " * 20, "a tree", "a key")
_SIZES = ((64, 64), (96, 64), (64, 64), (64, 96))
_BASE: dict[str, Any] = {"rank": 4, "learning_rate": 2e-3, "seed": 3, "lora_dtype": "fp32", "validation_share": 0.0}
_OTHERS: dict[str, dict[str, Any]] = {
    "loha": {"algorithm": "LoHa", "optimizer": "ScheduleFree"},
    "boft": {"algorithm": "BOFT", "optimizer": "Prodigy"},
    "glora": {"algorithm": "GLoRA", "optimizer": "Adafactor"},
    "full": {"algorithm": "Full", "optimizer": "SGD"},
    "pissa": {"pissa": True, "optimizer": "Lion"},
    "tucker": {"tucker": True, "targets": "all", "optimizer": "RMSprop"},
}


@dataclass(frozen=True)
class Outcome:
    """What a case computed.

    Attributes:
        losses: training loss of each step; empty where the case trains through the command line.
        tensors: saved LoRA tensors by file and key, validation losses, pictures.
    """

    losses: list[float]
    tensors: dict[str, Tensor]


def lora(folder: Path) -> Outcome:
    """LoRA on all-linear in fp32 with rank and module dropout, averaged weights and a validation share."""
    dropout = {"rank_dropout": 0.2, "module_dropout": 0.1}
    # Averages decay faster at the start of a run: only a small ema_decay has an effect within a few steps.
    watched = {"validation_share": 0.25, "validate_every": 2, "validation_draws": 2, "ema_decay": 0.2}
    run = {"steps": 6, "batch_size": 2, "training_dtype": "fp32", "targets": "all-linear"}
    return _trained(*_tiny(folder), folder, **run, **dropout, **watched)


def lokr(folder: Path) -> Outcome:
    """LoKr on all layers in bf16 with accumulation, independent timesteps, loss weighting and noise offset."""
    weighting = {"loss_weighting": "min_snr", "min_snr_gamma": 0.5}  # low enough that most draws reach it
    loss = {"stratified": False, "noise_offset": 0.05, "loss_function": "Huber", **weighting}
    run = {"steps": 3, "grad_accumulation_steps": 2, "training_dtype": "bf16", "targets": "all"}
    return _trained(*_tiny(folder), folder, algorithm="LoKr", **run, **loss)


def oft(folder: Path) -> Outcome:
    """OFT on attention in fp32, batches of mixed sizes, cosine schedule with warm-up, x0 objective."""
    rate = {"schedule": "cosine", "warmup_steps": 2, "final_rate": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.01}
    run = {"steps": 5, "batch_size": 3, "training_dtype": "fp32", "targets": "attention", "objective": "x0"}
    return _trained(*_tiny(folder), folder, algorithm="OFT", **run, **rate)


def dora(folder: Path) -> Outcome:
    """DoRA of both kinds in bf16 with activation checkpointing, norm and bias differences, LoRA+ and rsLoRA."""
    run = {"steps": 3, "batch_size": 2, "training_dtype": "bf16", "gradient_checkpointing": True}
    variants = {"differences": "norms+biases", "lora_plus_ratio": 4.0, "rslora": True, "lora_dtype": "bf16"}
    model, data = _tiny(folder)
    whole = _trained(model, data, folder / "output", targets="all", dora="output", **run, **variants)
    part = _trained(model, data, folder / "input", targets="attention", dora="input", **run)
    return _merged({"output": whole, "input": part})


def flux(folder: Path) -> Outcome:
    """LoRA on Flux.1 in fp32: mixed sizes, wide activations recomputed, linear schedule, weights per layer choice."""
    run = {"steps": 3, "batch_size": 3, "training_dtype": "fp32", "activations": "selective", "schedule": "linear"}
    return _trained(*_flux(folder), folder, targets="*attn* rank=2 lr=1e-3, *ff*", **run)


def flux_lokr(folder: Path) -> Outcome:
    """LoKr on Flux.1 in bf16: checkpointing inside blocks, shifted timesteps; then a run that continues its file."""
    run = {"batch_size": 2, "training_dtype": "bf16", "gradient_checkpointing": True, "checkpoint_depth": 2}
    model, data = _flux(folder)
    first = _trained(model, data, folder / "first", algorithm="LoKr", steps=2, timesteps="shifted", **run)
    file = str(folder / "first" / "lora.safetensors")
    return _merged({"first": first, "then": _trained(model, data, folder / "then", existing_lora=file, steps=2, **run)})


def int8(folder: Path) -> Outcome:
    """LoRA on an int8 base, convolutions included, and on an int8 Flux.1."""
    tiny = _trained(*_tiny(folder), folder / "tiny", steps=3, training_dtype="fp32", targets="all", quantization="int8")
    other = _trained(*_flux(folder), folder / "flux", steps=2, training_dtype="bf16", quantization="int8")
    return _merged({"tiny": tiny, "flux": other})


def resumed(folder: Path) -> Outcome:
    """A run with dropout, averaged weights and validation, stopped after three steps and continued from its folder."""
    watched = {"validation_share": 0.25, "validate_every": 2, "validation_draws": 2, "ema_decay": 0.2}
    run = {"steps": 7, "batch_size": 2, "grad_accumulation_steps": 2, "training_dtype": "fp32", "rank_dropout": 0.2}
    rate = {"schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 0.01}
    settings = {**_BASE, **run, **watched, **rate, "targets": "attention"}
    model, data = _tiny(folder)
    asked = itertools.count(1)
    begun = ls.train(model, data, output=folder / "run", cancelled=lambda: next(asked) > 3, **settings)
    if not 0 < len(begun.losses) < settings["steps"]:
        raise RuntimeError(f"the run must stop after a few of its steps, took {len(begun.losses)}")
    result = ls.train(model, data, output=folder / "run", **settings)
    return Outcome(result.losses, {**_saved(folder / "run"), **_validations(result)})


def graph(folder: Path) -> Outcome:
    """A ComfyUI graph through `lorasmith run`: encode, train, save, apply, sample, decode."""
    _write_pictures(folder / "input" / "pictures")
    nodes = {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in _NODES.items()}
    (folder / "graph.json").write_text(json.dumps(nodes), encoding="utf-8")
    _command("run", folder / "graph.json", "--base-dir", folder, "--set", "5.steps=3")
    (picture,) = (folder / "output").glob("*.png")
    return Outcome([], {**_saved(folder / "output" / "loras"), "picture": _pixels(Image.open(picture))})


def others(folder: Path) -> Outcome:
    """Other algorithms and variants, each with another optimizer; `lorasmith train` by its defaults, and pictures."""
    model, data = _tiny(folder)
    run = {"steps": 2, "training_dtype": "fp32", "targets": "attention"}
    runs = {name: _trained(model, data, folder / name, **{**run, **other}) for name, other in _OTHERS.items()}
    model_name, output = ("--model", "lorasmith-tiny"), ("--output", folder / "run", "--name", "lora")
    plain = ("--preset", "none") if "preset" in inspect.signature(ls.train).parameters else ()  # earlier ones had none
    _command("train", folder / "pictures", *model_name, *output, "--steps", 3, "--trigger", "sks", *plain)
    applied = ls.Lora.load(folder / "run" / "lora.safetensors", model).applied_to(model.denoiser)
    drawn = {f"picture {index}": _pixels(one) for index, one in enumerate(ls.generate(applied, ["sks", ""], steps=2))}
    return _merged({**runs, "command": Outcome([], {**_saved(folder / "run"), **drawn})})


CASES: dict[str, Callable[[Path], Outcome]] = {
    case.__name__: case for case in (lora, lokr, oft, dora, flux, flux_lokr, int8, resumed, graph, others)
}
"""Name → case; a case is given an empty folder of its own."""


# fmt: off
_NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "1": ("CheckpointLoaderSimple", {"ckpt_name": "lorasmith-tiny.safetensors"}),
    "2": ("LoadImageTextDataSetFromFolder", {"folder": "pictures"}),
    "3": ("ImageScale", {
        "image": ["2", 0], "upscale_method": "lanczos", "width": 64, "height": 64, "crop": "center",
    }),
    "4": ("MakeTrainingDataset", {"images": ["3", 0], "vae": ["1", 2], "clip": ["1", 1], "texts": ["2", 1]}),
    "5": ("TrainLoraNode", {
        "model": ["1", 0], "latents": ["4", 0], "positive": ["4", 1], "batch_size": 3, "grad_accumulation_steps": 1,
        "steps": 9, "learning_rate": 0.01, "rank": 4, "optimizer": "AdamW", "loss_function": "MSE", "seed": 1,
        "training_dtype": "bf16", "lora_dtype": "bf16", "quantized_backward": False, "algorithm": "LoRA",
        "gradient_checkpointing": True, "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]",
        "bucket_mode": False, "bypass_mode": False,
    }),
    "6": ("SaveLoRA", {"lora": ["5", 0], "prefix": "loras/lora", "steps": ["5", 2]}),
    "7": ("LoraModelLoader", {"model": ["1", 0], "lora": ["5", 0], "strength_model": 0.8, "bypass": False}),
    "8": ("CLIPTextEncode", {"text": "a lion", "clip": ["1", 1]}),
    "9": ("CLIPTextEncode", {"text": "", "clip": ["1", 1]}),
    "10": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "11": ("KSampler", {
        "model": ["7", 0], "positive": ["8", 0], "negative": ["9", 0], "latent_image": ["10", 0], "seed": 1,
        "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
    }),
    "12": ("VAEDecode", {"samples": ["11", 0], "vae": ["1", 2]}),
    "13": ("SaveImage", {"images": ["12", 0], "filename_prefix": "picture"}),
}
# fmt: on


def _trained(model: Any, data: EncodedDataset, folder: Path, **settings: Any) -> Outcome:
    """Train without a run folder and save the LoRA to `folder`."""
    folder.mkdir(exist_ok=True)
    result = ls.train(model, data, **{**_BASE, **settings})
    result.lora.save(folder / "lora.safetensors")
    return Outcome(result.losses, {**_saved(folder), **_validations(result)})


def _saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of the LoRA files directly in a folder, named `FILE: KEY`."""
    files = {path.stem: load_file(path) for path in sorted(folder.glob("*lora*.safetensors"))}
    if not files:
        raise RuntimeError(f"a case must save a LoRA, found none in {folder}")
    return {f"{stem}: {key}": tensor for stem, tensors in files.items() for key, tensor in tensors.items()}


def _validations(result: Any) -> dict[str, Tensor]:
    if result.base_loss is None:
        return {}
    history = torch.tensor(result.validations, dtype=torch.float64)
    return {"validation": history, "base loss": torch.tensor(result.base_loss, dtype=torch.float64)}


def _merged(parts: dict[str, Outcome]) -> Outcome:
    """Several outcomes as one, the names of the parts in front of the tensors' names."""
    tensors = {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.tensors.items()}
    return Outcome([loss for part in parts.values() for loss in part.losses], tensors)


def _tiny(folder: Path) -> tuple[Any, EncodedDataset]:
    """The built-in model, and eight pictures of three sizes with captions of one and of several chunks."""
    model = ls.load_model("lorasmith-tiny")
    _write_pictures(folder / "pictures")
    return model, ls.load_dataset(folder / "pictures", model, trigger="sks", resolution=64)


def _flux(folder: Path) -> tuple[Any, EncodedDataset]:
    """A Flux.1 denoiser with random weights from a file in the original layout, and four samples of two sizes."""
    save_file(models.tiny_flux_checkpoint(0), folder / "flux.safetensors")
    return ls.load_model(folder / "flux.safetensors"), _flux_dataset()


def _write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for index, caption in enumerate(_CAPTIONS):
        width, height = _SIZES[index % len(_SIZES)]
        coarse = (models.seeded("picture", (6, 6, 3), seed=index, std=0.25, mean=0.5).clamp(0, 1) * 255).byte()
        Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        if caption:
            (folder / f"{index}.txt").write_text(caption, encoding="utf-8")


def _pixels(image: Image.Image) -> Tensor:
    width, height = image.size
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(height, width, 3)


def _command(*arguments: object) -> None:
    """Run `lorasmith ARGUMENTS` in this process. Raises RuntimeError if it exits with an error."""
    from lorasmith.cli.main import main

    code: object = 0
    with mock.patch.object(sys, "argv", ["lorasmith", *map(str, arguments)]):
        try:
            main()
        except SystemExit as end:
            code = end.code
    if code:
        raise RuntimeError(f"lorasmith {arguments[0]} exited with status {code}")


def _flux_dataset() -> EncodedDataset:
    # The only imports below the public API: no text encoder of Flux.1 comes with the package.
    from lorasmith.data.dataset import EncodedDataset, Sample

    shape = models.FLUX_TINY
    samples = []
    for index in range(4):
        tensors = {
            "context": models.seeded("context", (1, 8, shape.context), seed=index),
            "pooled": models.seeded("pooled", (1, shape.pooled), seed=index),
            "guidance": torch.full((1,), 3.5),
        }
        latents = models.seeded("latents", (shape.latent_channels, 16, 16 + 8 * (index % 2)), seed=index)
        samples.append(Sample(latents, ls.Conditioning(tensors), str(index)))
    return EncodedDataset(tuple(samples))


def _main(folder: Path, names: list[str]) -> None:
    print("package:", Path(ls.__file__).parent)
    for name in names:
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
            try:
                torch.save(asdict(CASES[name](Path(scratch))), folder / f"{name}.pt")
            except Exception:  # the other cases still say something
                (folder / f"{name}.error").write_text(traceback.format_exc(), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]).resolve(), sys.argv[2:])
