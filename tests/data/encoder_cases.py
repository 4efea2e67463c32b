"""An encoder that stands for a model, and folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorasmith.data.clips import ClipForm
from lorasmith.data.data_config import DataConfig
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset
from lorasmith.data.encoding import encode_images
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.data.picture_encoding import PictureEncoder
from lorasmith.families.conditionings import Conditioning


class Encoder:
    """Latents are the pixels' 4×4 means, conditioning the length of the caption; counts what it encodes."""

    def __init__(self) -> None:
        self.clips: ClipForm | None = None
        self.texts: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(pixels.shape))
        if self.clips is not None:
            frames = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
            return torch.nn.functional.avg_pool3d(frames[:, :, ::4], (1, 4, 4)).to(torch.bfloat16)
        return torch.nn.functional.avg_pool2d(pixels, 4).to(torch.bfloat16)

    def text(self, text: str) -> Conditioning:
        self.texts.append(text)
        return Conditioning({"context": torch.full((1, 1, 1), float(len(text)))}, text)

    def encode(self, folder: Path | FolderScan, **options: Any) -> EncodedDataset:
        """A folder encoded; options are those of `encode_images`, `PictureEncoder` and `DataConfig`."""
        options = {"resolution": 64, "multiple": 16, **options}
        self.clips = options.pop("clips", None)
        called = {name: options.pop(name) for name in ("resolution", "multiple")}
        called |= {name: options.pop(name) for name in ("progress",) if name in options}
        own = {name: options.pop(name) for name in ("batch_pixels", "beside_pixels", "entries") if name in options}
        captions = {"memory_bytes": options.pop("memory_bytes")} if "memory_bytes" in options else {}
        if "text_entries" in options:
            captions["entries"] = options.pop("text_entries")
        config = DataConfig(**options)
        return encode_images(
            scan_folder(folder, config, clips=self.clips is not None) if isinstance(folder, Path) else folder,
            config,
            captions=EncodedCaptions(self.text, **captions),
            pictures=PictureEncoder(encode=self.image, downscale=4, clips=self.clips, **own),
            **called,
        )


def add(folder: Path, name: str, size: tuple[int, int], colour: Any, caption: str | None = None) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def three_pictures(folder: Path) -> Path:
    """A folder of three pictures of three shapes, two of which have one caption."""
    add(folder, "1.png", (100, 100), (255, 255, 255), "a dog")
    add(folder, "2.png", (200, 100), (0, 0, 0), "a cat")
    add(folder, "3.png", (50, 100), (255, 0, 0), "a dog")
    return folder
