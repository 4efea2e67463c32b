"""Runs on small folders of images, and ways to change what they have written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorasmith.data.data_config import ImageSource
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.metadata import RUN_ENTRY, sha256_body
from lorasmith.runs.plan import FolderPlan, plan
from lorasmith.runs.recorded_run import Typed
from lorasmith.runs.run import Host
from lorasmith.runs.spec import RunSpec

CONFIRMED = Typed(files=True)
"""The pictures of these runs lie outside the folder in which the tests run."""


def pictures(folder: Path, number: int, *, seed: int = 0) -> Path:
    """A folder of noise pictures."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(number):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def asked(images: Path, **settings: Any) -> RunSpec:
    """A run of five quick steps, named `cat`."""
    quick = {"rank": 2, "targets": "*.attn2.to_q", "steps": 5, "schedule": "cosine", "previews": "", "resolution": 32}
    sources = (ImageSource(str(images)),)
    return RunSpec(sources=sources, model="lorasmith-tiny", name="cat", settings={**quick, **settings}).resolved()


def planned(images: Path, output: Path | None = None, **settings: Any) -> FolderPlan:
    """That run, ready to begin."""
    return plan(placed(asked(images, **settings), output), Host())


def placed(spec: RunSpec, output: Path | None) -> RunSpec:
    return replace(spec, output=None if output is None else str(output))


def tensors_of(folder: Path) -> str:
    """Hash of the tensors that a run made."""
    return sha256_body(folder / "cat.safetensors")


def with_record(folder: Path, **changes: object) -> None:
    """Change `run.json`; what is a mapping is laid over what is there."""
    record = json.loads((folder / "run.json").read_text())
    for key, value in changes.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) and value else value
    (folder / "run.json").write_text(json.dumps(record))


def with_metadata(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a LoRA says of the run that made it."""
    tensors, metadata = read_safetensors(path)
    run = json.loads(metadata[RUN_ENTRY])
    change(run)
    write_safetensors(path, tensors, {**metadata, RUN_ENTRY: json.dumps(run)})
