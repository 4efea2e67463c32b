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
socket.socket.connect = socket.getaddrinfo = refuse
import lorasmith as ls, torch
peaks = {}
def note(what):  # the peak of resident memory so far, files that are mapped included
    peaks[what] = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
model, settings = ls.load_model(sys.argv[1]), json.loads(sys.argv[2])
note("loaded")
side, controls = settings.pop("resolution"), settings.pop("controls", None)
if controls is None:
    data = ls.load_dataset("photos", model, trigger="sks thing", resolution=side)
else:  # there is a denoiser alone
    shapes = model.family.conditioning_shapes(model.components.denoiser)
    picture = model.components.latent.shape(side, side)
    prompt = ls.Conditioning({name: torch.randn(shape) for name, shape in shapes.items()})
    prompt = prompt.with_controls([torch.randn(1, *picture) for _ in range(controls)])
    data = [ls.Sample(torch.randn(picture), prompt, "picture")]
result = ls.train(
    model, data, **settings, training_dtype="bf16", validation_share=0.0,
    on_event=lambda event: note(f"last {type(event).__name__}"),
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
    result = trained(written(tmp_path / "sd15.safetensors", shapes, torch.float16), steps=5, resolution=256)
    assert len(result["losses"]) == 5
    assert max(result["peaks"].values()) < 12 * GIB
    assert_modules(tmp_path, "kohya_sd15_modules.json")


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
    denoiser = FAMILIES[family].released_denoiser(**changes)
    shapes = {key: tuple(tensor.shape) for key, tensor in original_tensors(family, denoiser).items()}
    checkpoint = written(tmp_path / f"{name}.safetensors", shapes, torch.bfloat16, torch.float8_e4m3fn)
    assert checkpoint.stat().st_size == pytest.approx(parameters, rel=0.02)
    controls = CONTROLS.get(name, 0)
    result = trained(checkpoint, steps=1, resolution=side, gradient_checkpointing=True, controls=controls)
    assert len(result["losses"]) == 1
    assert max(result["peaks"].values()) < 24 * GIB


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
    result = trained(checkpoint, steps=1, resolution=512, gradient_checkpointing=True)
    assert len(result["losses"]) == 1
    assert result["peaks"]["last RunStarted"] < 1.25 * size + 0.6e9
    assert max(result["peaks"].values()) < 24 * GIB
    assert_modules(tmp_path, "kohya_sdxl_modules.json")


def assert_modules(folder: Path, golden: str) -> None:
    names = {key.split(".")[0] for key in load_file(folder / "lora.safetensors")}
    assert sorted(names) == json.loads((GOLDEN / golden).read_text())["unet"]


def trained(checkpoint: Path, **settings: Any) -> dict[str, Any]:
    """What training on three pictures or on a random one says, in a process and a folder of its own."""
    folder = checkpoint.parent
    (folder / "photos").mkdir()
    for index, shade in enumerate((40, 120, 200)):
        Image.new("RGB", (600 + 200 * index, 600), (shade, 90, 255 - shade)).save(folder / "photos" / f"{index}.png")
    command = [sys.executable, "-c", TRAIN, checkpoint.name, json.dumps({"rank": 16, **settings})]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(checkpoint.stat().st_size, result)
    checkpoint.unlink()
    return result


def under(prefix: str, shapes: Any) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in dict(shapes).items()}


SPELLED = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


def written(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, matrices: torch.dtype | None = None
) -> Path:
    """A safetensors file whose tensors repeat a block of random values; matrices may have a format of their own."""
    block = models.seeded("block", (2**22,), seed=0, std=0.02)
    dtypes = {name: (matrices or dtype) if len(shape) > 1 else dtype for name, shape in shapes.items()}
    blocks = {one: block.to(one).view(torch.uint8).numpy().tobytes() for one in {*dtypes.values()}}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + dtypes[name].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": SPELLED[dtypes[name]], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as in published files: tensors that are not aligned cannot stay on the file
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            values, left = blocks[dtypes[name]], dtypes[name].itemsize * torch.Size(shape).numel()
            while left:
                file.write(values[:left])
                left -= min(left, len(values))
    return path
