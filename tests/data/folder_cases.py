"""Folders of small images for tests."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lorasmith.data.folder import FolderScan


def add_image(path: Path, caption: str | None = None, size: tuple[int, int] = (32, 24)) -> Path:
    """Write an image, and its caption file if there is a caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def names(scan: FolderScan) -> list[str]:
    return [image.path.name for image in scan.images]
