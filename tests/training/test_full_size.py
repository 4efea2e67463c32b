"""Models at full size, with random weights in the original single-file layout.

Slow (minutes, 2 to 12 GB of disk, up to 24 GiB of memory): `pytest -m slow`.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorasmith.families import loading  # noqa: F401  (registers the families)
from lorasmith.families.base import FAMILIES
from tests.families.original_models import VOCABULARY, autoencoder_shapes, clip_l_shapes, openclip_shapes
from tests.families.tiny_parts import original_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
GIB = 2**30

TRAIN = """
import json, re, socket, sys
from pathlib import Path
def refuse(*_, **__): raise AssertionError("the network was used")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import lorasmith as ls, torch
peaks = {}
def note(what):  # the peak of resident memory so far, files that are mapped included
    peaks[what] = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
checkpoint, settings = sys.argv[1], json.loads(sys.argv[2])
model = ls.load_model(checkpoint)
note("loaded")
data = ls.load_dataset("photos", model, trigger="sks thing", resolution=settings.pop("resolution"))
note("encoded")
result = ls.train(
    model, data, **settings, training_dtype="bf16", on_event=lambda event: note(f"last {type(event).__name__}")
)
result.lora.save("lora.safetensors")
print(json.dumps({"losses": result.losses, "peaks": peaks}))
"""


@pytest.mark.slow
def test_a_full_size_checkpoint_trains_offline_within_12_gib(tmp_path: Path) -> None:
    shapes = {
        **under(models.UNetShape.prefix, models.SD1_FULL.tensors()),
        **under("cond_stage_model.transformer.text_model.", clip_l_shapes(12, VOCABULARY, 768)),
        **under("first_stage_model.", autoencoder_shapes((128, 256, 512, 512))),
    }
    result = trained(written(tmp_path / "sd15.safetensors", shapes, torch.float16), steps=5, rank=16, resolution=256)

    assert len(result["losses"]) == 5
    assert max(result["peaks"].values()) < 12 * GIB
    names = {key.split(".")[0] for key in load_file(tmp_path / "lora.safetensors")}
    assert sorted(names) == json.loads((GOLDEN / "kohya_sd15_modules.json").read_text())["unet"]


TRAIN_DENOISER = """
import json, re, sys
from pathlib import Path
import lorasmith as ls, torch
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
peaks = {}
def note(what):  # the peak of resident memory so far, files that are mapped included
    peaks[what] = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
checkpoint, settings = sys.argv[1], json.loads(sys.argv[2])
model = ls.load_model(checkpoint)
note("loaded")
side = settings.pop("resolution")
shapes = model.family.conditioning_shapes(model.components.denoiser)
picture = model.components.latent.shape(side, side)
controls = [torch.randn(1, *picture) for _ in range(settings.pop("controls"))]
prompt = Conditioning({name: torch.randn(shape) for name, shape in shapes.items()}).with_controls(controls)
data = EncodedDataset((Sample(torch.randn(picture), prompt, "picture"),))
result = ls.train(
    model, data, **settings, training_dtype="bf16", validation_share=0.0,
    on_event=lambda event: note(f"last {type(event).__name__}"),
)
note("trained")
print(json.dumps({"losses": result.losses, "peaks": peaks, "adapters": len(result.lora.state.adapters)}))
"""


SD35_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
SD35_LARGE = {"dual_attention_layers": ()}
WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
FULL_SIZE = {
    "flux1": ("flux1", {}, 11.9e9, 512),
    "z-image": ("z-image", {}, 6.15e9, 512),
    "anima": ("anima", {}, 2.09e9, 256),
    "lumina2": ("lumina2", {}, 2.61e9, 256),
    "sd3.5-medium": ("sd3", SD35_MEDIUM, 2.47e9, 256),
    "sd3.5-large": ("sd3", SD35_LARGE, 8.15e9, 256),
    "wan-1.3b": ("wan", WAN_1_3B, 1.42e9, 256),
    "wan22-5b": ("wan22-5b", {}, 5.0e9, 256),
    "ernie-image": ("ernie-image", {}, 8.03e9, 256),
    "chroma": ("chroma", {}, 8.9e9, 256),
    "wan-14b": ("wan", {}, 14.29e9, 256),
    "flux1-kontext": ("flux1", {}, 11.9e9, 256),
    "wan22-i2v-14b": ("wan-i2v", {"image_dim": None, "added_kv_proj_dim": None}, 14.29e9, 256),
}
"""Family, its released configuration's changes, parameters, and the side of the picture.

Qwen-Image, Krea 2 and Flux.2 dev need more memory.
"""

CONTROLS = {"flux1-kontext": 1}
"""Number of controls of edit models, of the picture's size."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_transformers_in_fp8_take_a_step_within_24_gib(name: str, tmp_path: Path) -> None:
    family, changes, parameters, side = FULL_SIZE[name]
    checkpoint = written_fp8(tmp_path / f"{name}.safetensors", released_shapes(family, changes))
    size = checkpoint.stat().st_size
    assert size == pytest.approx(parameters, rel=0.02)
    settings = {
        "steps": 1,
        "rank": 16,
        "resolution": side,
        "gradient_checkpointing": True,
        "controls": CONTROLS.get(name, 0),
    }
    command = [sys.executable, "-c", TRAIN_DENOISER, str(checkpoint), json.dumps(settings)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    checkpoint.unlink()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(name, size, result)
    assert len(result["losses"]) == 1
    assert max(result["peaks"].values()) < 24 * GIB


def released_shapes(family: str, changes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a released denoiser's tensors by original name, from the published configuration."""
    denoiser = FAMILIES[family].released_denoiser(**changes)
    return {name: tuple(tensor.shape) for name, tensor in original_tensors(family, denoiser).items()}


@pytest.mark.slow
def test_stable_diffusion_xl_takes_a_step_in_little_more_memory_than_its_file(tmp_path: Path) -> None:
    shapes = {
        **under(models.UNetShape.prefix, models.SDXL_FULL.tensors()),
        **under("conditioner.embedders.0.transformer.text_model.", clip_l_shapes(12, VOCABULARY, 768)),
        **under("conditioner.embedders.1.model.", openclip_shapes(32, VOCABULARY, 1280)),
        **under("first_stage_model.", autoencoder_shapes((128, 256, 512, 512))),
    }
    checkpoint = written(tmp_path / "sdxl.safetensors", shapes, torch.bfloat16)
    size = checkpoint.stat().st_size
    result = trained(checkpoint, steps=1, rank=16, resolution=512, gradient_checkpointing=True)
    checkpoint.unlink()

    assert len(result["losses"]) == 1
    assert result["peaks"]["last RunStarted"] < 1.25 * size + 0.6e9
    assert max(result["peaks"].values()) < 24 * GIB
    names = {key.split(".")[0] for key in load_file(tmp_path / "lora.safetensors")}
    assert sorted(names) == json.loads((GOLDEN / "kohya_sdxl_modules.json").read_text())["unet"]


def trained(checkpoint: Path, **settings: Any) -> dict[str, Any]:
    """What training on three pictures says, in a process and a folder of its own."""
    folder = checkpoint.parent
    (folder / "photos").mkdir()
    for index, shade in enumerate((40, 120, 200)):
        Image.new("RGB", (600 + 200 * index, 600), (shade, 90, 255 - shade)).save(folder / "photos" / f"{index}.png")
    command = [sys.executable, "-c", TRAIN, checkpoint.name, json.dumps(settings)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(checkpoint.stat().st_size, result)
    return result


def under(prefix: str, shapes: Any) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in dict(shapes).items()}


def written_fp8(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A safetensors file with matrices in fp8 and vectors in bf16, which repeat a block of random values."""
    block = models.seeded("block", (2**22,), seed=0, std=0.02)
    blocks = {
        dtype: block.to(dtype).view(torch.uint8).numpy().tobytes() for dtype in (torch.float8_e4m3fn, torch.bfloat16)
    }
    dtypes = {name: torch.float8_e4m3fn if len(shape) > 1 else torch.bfloat16 for name, shape in shapes.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + dtypes[name].itemsize * torch.Size(shape).numel()
        spelled = "F8_E4M3" if len(shape) > 1 else "BF16"
        header[name] = {"dtype": spelled, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            values, left = blocks[dtypes[name]], dtypes[name].itemsize * torch.Size(shape).numel()
            while left:
                file.write(values[:left])
                left -= min(left, len(values))
    return path


def written(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Path:
    """A safetensors file of random weights, made one tensor at a time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        spelled = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        header[name] = {"dtype": spelled, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as in published files: tensors that are not aligned cannot stay on the file
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            value = models.weight(name, shape, seed=0).to(dtype)
            file.write(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return path
