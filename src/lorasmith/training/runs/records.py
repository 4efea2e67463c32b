"""The content of `run.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from lorasmith.data.split import Split
from lorasmith.training.job import Job
from lorasmith.training.runs.fingerprint import environment, fingerprint

__all__ = ["run_record"]


def run_record(job: Job, parts: Split, *, title: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `run.json`.

    Args:
        job: the planned run.
        parts: training and held-out samples.
        title: name of the LoRA.
        source: JSON values from which the run can be repeated.
    """
    base = job.denoiser.base
    held_out = parts.held_out.samples if parts.held_out else ()
    return {
        "title": title,
        "source": dict(source),
        "model": {
            "name": base.title,
            "path": str(base.path) if base.path else None,
            "family": base.family.name,
            "files": {part: str(path) for part, path in base.files.items()},
        },
        "config": asdict(job.config),
        "asked": asdict(job.requested),
        "steps_before": job.steps_before,
        "samples": [
            {"name": sample.name, "caption": sample.conditioning.text, "latents": list(sample.latents.shape)}
            for sample in parts.training.samples
        ],
        "data": {
            **{name: source[name] for name in ("folder", "trigger", "resolution", "validation") if source.get(name)},
            "held_out": ", ".join(dict.fromkeys(sample.name for sample in held_out)),
            "note": parts.note,
        },
        "command": list(source.get("argv", ())),
        "adapters": {path: _size(adapter) for path, adapter in job.adapters.items()},
        "differences": {path: _size(difference) for path, difference in job.differences.items()},
        "fingerprint": fingerprint(job, parts.training, parts.held_out),
        "environment": environment(job.runtime.device, job.config.optimizer, compile=job.config.compile),
    }


def _size(trained: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trained.parameters())
