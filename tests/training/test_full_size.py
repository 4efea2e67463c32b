"""Stable Diffusion 1.5 at full size, with random weights in the original single-file layout.

Slow (a minute, 12 GiB of memory, 2 GiB of disk): `pytest -m slow`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "kohya_sd15_modules.json"
VAE_WIDTHS = (128, 256, 512, 512)

TRAIN = """
import json, resource, socket, sys
def refuse(*_, **__): raise AssertionError("the network was used")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import lorasmith as ls, torch
model = ls.load_model(sys.argv[1], dtype=torch.bfloat16)
data = ls.load_dataset(sys.argv[2], model, trigger="sks thing", resolution=256)
result = ls.train(model, data, steps=5, rank=16)
result.lora.save(sys.argv[3])
print(json.dumps({"losses": result.losses, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


@pytest.mark.slow
def test_a_full_size_checkpoint_trains_offline_within_12_gib(tmp_path: Path) -> None:
    from PIL import Image

    save_file(_checkpoint(), tmp_path / "sd15.safetensors")
    (tmp_path / "photos").mkdir()
    for index, shade in enumerate((40, 120, 200)):
        Image.new("RGB", (300 + 100 * index, 300), (shade, 90, 255 - shade)).save(tmp_path / "photos" / f"{index}.png")
    command = [sys.executable, "-c", TRAIN, "sd15.safetensors", "photos", "lora.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert len(result["losses"]) == 5
    assert result["peak_kib"] < 12 * 2**20
    names = {key.split(".")[0] for key in load_file(tmp_path / "lora.safetensors")}
    assert sorted(names) == json.loads(GOLDEN.read_text())["unet"]


def _checkpoint() -> dict[str, Tensor]:
    from transformers import CLIPTextConfig, CLIPTextModel

    tensors = models.checkpoint(models.SD1_FULL, 0, torch.float16)
    clip = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    for name, tensor in clip.state_dict().items():
        inner = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{inner}"] = tensor.half()
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    g = torch.Generator().manual_seed(1)
    for name, shape in _autoencoder():
        scale = 0.5 / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        value = torch.rand(shape, generator=g).sub(0.5).mul(2 * scale) if len(shape) > 1 else torch.ones(shape)
        tensors[f"first_stage_model.{name}"] = value.half()
    return tensors


def _autoencoder() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _conv("encoder.conv_in", 3, 128)
    width = 128
    for level, out in enumerate(VAE_WIDTHS):
        for block in range(2):
            yield from _resnet(f"encoder.down.{level}.block.{block}", width, out)
            width = out
        if level < 3:
            yield from _conv(f"encoder.down.{level}.downsample.conv", out, out)
    yield from _middle("encoder", 8)
    yield from _conv("quant_conv", 8, 8, 1)
    yield from _conv("post_quant_conv", 4, 4, 1)
    yield from _conv("decoder.conv_in", 4, 512)
    yield from _middle("decoder", 3, 128)
    width = 512
    for level in reversed(range(4)):
        for block in range(3):
            yield from _resnet(f"decoder.up.{level}.block.{block}", width, VAE_WIDTHS[level])
            width = VAE_WIDTHS[level]
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width)


def _middle(side: str, out: int, last: int = 512) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _resnet(f"{side}.mid.block_1", 512, 512)
    yield from _norm(f"{side}.mid.attn_1.norm", 512)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{side}.mid.attn_1.{part}", 512, 512, 1)
    yield from _resnet(f"{side}.mid.block_2", 512, 512)
    yield from _norm(f"{side}.norm_out", last)
    yield from _conv(f"{side}.conv_out", last, out)


def _resnet(name: str, width: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", width)
    yield from _conv(f"{name}.conv1", width, out)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if width != out:
        yield from _conv(f"{name}.nin_shortcut", width, out, 1)


def _conv(name: str, width: int, out: int, kernel: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, width, kernel, kernel)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
