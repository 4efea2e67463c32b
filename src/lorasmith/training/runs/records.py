"""What is written down about a run: the record in its folder and the metadata in its LoRA."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorasmith.adapters.algorithms import format_named
from lorasmith.core.dtypes import chosen_dtype, dtype_name
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.data.split import Split
from lorasmith.families.model import Model
from lorasmith.formats.hashes import autov1, sha256_file
from lorasmith.formats.metadata import RUN_ENTRY, TrainingFacts, build_metadata, tag_frequency, without_private
from lorasmith.training.runs.fingerprint import environment, fingerprint

if TYPE_CHECKING:
    from lorasmith.training.config import TrainConfig
    from lorasmith.training.job import Job

__all__ = ["run_record", "training_metadata"]


def run_record(
    job: Job, parts: Split, *, title: str, source: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Content of `run.json`."""
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
        "asked": asdict(job.asked),
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
        "environment": environment(device, job.config.optimizer, compile=job.config.compile),
    }


def training_metadata(
    job: Job,
    data: EncodedDataset,
    *,
    title: str,
    trigger: str | None,
    steps: int,
    started: float,
    record: Mapping[str, Any],
) -> dict[str, str]:
    """Header metadata of the LoRA that a run makes; `record` is that of the run."""
    config, base = job.config, job.denoiser.base
    family, components = base.family, base.components
    taken = (steps - job.steps_before) * config.batch_size * config.grad_accumulation_steps
    facts = TrainingFacts(
        kohya_version=family.kohya_version(components.parameterization),
        modelspec_architecture=family.modelspec_architecture(components.parameterization),
        modelspec_implementation=family.modelspec_implementation,
        resolution=_largest_picture(base, data),
        rank=config.rank,
        alpha=float(config.rank if config.alpha is None else config.alpha),
        algorithm=config.algorithm.lower(),
        targets=config.targets or "",
        steps=steps,
        base_model=base.title,
        **_hashes(base.path),
        prediction_type={"flow": ""}.get(components.parameterization, components.parameterization),
        epochs=-(-taken // len(data)),
        learning_rate=config.learning_rate,
        optimizer=config.optimizer,
        batch_size=config.batch_size,
        accumulation=config.grad_accumulation_steps,
        seed=config.seed,
        training_dtype=dtype_name(chosen_dtype(config.training_dtype, job.denoiser.module)),
        lora_dtype=config.lora_dtype,
        num_images=len({sample.name for sample in data.samples}),
        max_grad_norm=config.max_grad_norm,
        loss={"MSE": "l2", "SmoothL1": "smooth_l1"}.get(config.loss_function, config.loss_function.lower()),
        lr_scheduler=config.schedule or "constant",
        gradient_checkpointing=config.gradient_checkpointing,
        network_args=_lycoris_args(config),
        buckets=Counter(_picture_size(base, sample) for sample in data.samples),
        tags=tag_frequency(sample.conditioning.text or "" for sample in data.samples),
        started=started,
        finished=time.time(),
        title=title,
        trigger=trigger or "",
        config=asdict(config),
    )
    told = ("source", "asked", "fingerprint", "environment", "environments")
    repeat = {name: record[name] for name in told if name in record}
    metadata = {**build_metadata(facts), RUN_ENTRY: json.dumps(repeat, sort_keys=True)}
    return without_private(metadata) if config.private else metadata


def _size(trained: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trained.parameters())


def _lycoris_args(config: TrainConfig) -> dict[str, object]:
    """What LyCORIS' network would be told of the adapters besides algorithm, rank and alpha."""
    args = {
        "dora_wd": config.dora != "none",
        "wd_on_output": config.dora == "output",
        "rs_lora": config.rslora,
        "use_tucker": config.tucker,
    }
    size = format_named(config.algorithm).lycoris_size
    return {**{name: value for name, value in args.items() if value}, **({size: config.rank} if size else {})}


def _largest_picture(base: Model, data: EncodedDataset) -> tuple[int, int]:
    """Width and height in pixels of the largest training picture."""
    return max((_picture_size(base, sample) for sample in data.samples), key=lambda size: size[0] * size[1])


def _picture_size(base: Model, sample: Sample) -> tuple[int, int]:
    factor = base.components.latent.downscale
    return sample.latents.shape[-1] * factor, sample.latents.shape[-2] * factor


def _hashes(path: Path | None) -> dict[str, str]:
    """Hashes of a single-file base model; folders have none that other programs would know."""
    if path is None or not path.is_file():
        return {}
    return dict(
        zip(("base_model_hash", "base_model_hash_autov1"), _file_hashes(path, path.stat().st_mtime_ns), strict=True)
    )


@lru_cache(maxsize=8)
def _file_hashes(path: Path, modified: int) -> tuple[str, str]:
    return sha256_file(path), autov1(path)
