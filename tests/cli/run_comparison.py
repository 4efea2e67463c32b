"""Run folders, compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def files_of(run: Path) -> set[str]:
    """The files of a run, as paths in its folder."""
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def events_of(run: Path) -> list[dict[str, Any]]:
    """The events in its log so far; none before there is one."""
    log = run / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def assert_same_tensors(run: Path, other: Path, name: str = "photos", tolerance: float = 1e-5) -> None:
    """The LoRAs in two folders are the same to rounding: those tensors that start as zeros by themselves.

    Args:
        run, other: the folders.
        name: of the LoRAs.
        tolerance: relative.
    """
    found, expected = (load_file(one / f"{name}.safetensors") for one in (run, other))
    assert found.keys() == expected.keys()
    for part in ("lora_(down|A)", "lora_(up|B)"):
        names = [name for name in expected if re.search(part, name)]
        whole = torch.cat([expected[name].flatten() for name in names])
        difference = torch.cat([(found[name] - expected[name]).flatten() for name in names])
        assert len(whole) and difference.norm() <= tolerance * whole.norm(), part
