"""Metadata of a trained LoRA about its run, in the entries that `formats.metadata` describes."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from lorasmith.adapters.algorithms import format_named, words_of
from lorasmith.core.adapter_state import SD_SCRIPTS
from lorasmith.core.placement import dtype_name
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoder_digest import RememberedDigests, file_sha256
from lorasmith.data.encoding_cache import default_cache
from lorasmith.families.model import Model
from lorasmith.formats.metadata import RUN_ENTRY, autov1, tag_frequency, without_private
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.job import Job
from lorasmith.training.storage.records import RunRecord

_ONE_AT_A_TIME = threading.Lock()
"""Of runs that train together, the first hashes the base model; the others reuse its digest."""

_DATASET = "dataset"
"""Stands for the name of the image folder in sd-scripts' entries."""


def training_metadata(
    job: Job,
    data: EncodedDataset,
    *,
    title: str,
    trigger: str | None,
    steps: int,
    started: float,  # seconds since 1970
    record: RunRecord,
    hashes: BaseHashes,  # left out until they are known
) -> dict[str, str]:
    """Header metadata of a LoRA, sorted by key; `steps` include those of a continued LoRA."""
    entries = {
        **_kohya(job, data, title=title, steps=steps, started=started),
        "ss_sd_model_hash": hashes.autov1,
        "ss_new_sd_model_hash": hashes.sha256,
        **_modelspec(job, data, title=title, trigger=trigger or ""),
        "lorasmith.steps": steps,
        "lorasmith.algorithm": job.config.algorithm.lower(),
        "lorasmith.targets": job.config.targets,
        "lorasmith.lora_dtype": job.config.lora_dtype,
        "lorasmith.config": asdict(job.config),
        "ss_training_comment": f"trigger: {trigger}" if trigger else "",
        RUN_ENTRY: record.to_entry(),
    }
    metadata = {key: _text(value) for key, value in sorted(entries.items()) if value is not None and value != ""}
    return without_private(metadata) if job.config.private else metadata


class BaseHashes:
    """Hashes of a single-file base model, computed on a thread inside its context; empty until they are known."""

    def __init__(self, path: Path | None) -> None:
        self.sha256 = self.autov1 = ""
        self._path = path
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._hash, name="lorasmith-hashes", daemon=True)

    def __enter__(self) -> Self:
        if self._path is not None and self._path.is_file():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def wait(self, cancelled: Callable[[], bool]) -> None:
        """Return when the hashes are known, or `cancelled` returns True."""
        while self._thread.is_alive() and not cancelled():
            self._thread.join(0.2)

    def _hash(self) -> None:
        assert self._path is not None
        with _ONE_AT_A_TIME, contextlib.suppress(OSError):
            sha256 = file_sha256(self._path, RememberedDigests(default_cache()), each_block=self._go_on)
            self.autov1 = autov1(self._path)
            self.sha256 = sha256

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise InterruptedError  # an OSError


def _kohya(job: Job, data: EncodedDataset, *, title: str, steps: int, started: float) -> dict[str, object]:
    config, base = job.config, job.denoiser.base
    version = base.family.kohya_version(job.denoiser.diffusion.parameterization)
    algorithm, arguments = config.algorithm.lower(), _lycoris_arguments(config)
    is_plain = SD_SCRIPTS in format_named(algorithm).programs and not arguments
    per_step = config.samples_per_step
    epochs = -(-(steps - job.steps_before) * per_step // len(data))
    images, of_class = (len({one.name for one in data.samples if one.is_class is wanted}) for wanted in (False, True))
    tags = _tags(data)
    buckets = Counter(_picture_sizes(base, data))
    width, height = max(buckets, key=_area)
    dtype = dtype_name(job.runtime.dtype)
    return {
        "ss_base_model_version": version,
        "ss_v2": version.startswith("sd_v2"),
        "ss_network_module": "networks.lora" if is_plain else "lycoris.kohya",
        "ss_network_dim": config.rank,
        "ss_network_alpha": float(config.alpha),
        "ss_network_args": {} if is_plain else {"algo": algorithm, **arguments},
        "ss_sd_model_name": base.title,
        "ss_output_name": title,
        "ss_training_started_at": started,
        "ss_training_finished_at": time.time(),
        "ss_resolution": f"({width}, {height})",
        "ss_steps": steps,
        "ss_max_train_steps": steps,
        "ss_epoch": epochs,
        "ss_num_epochs": epochs,
        "ss_num_train_images": images,
        "ss_num_reg_images": of_class,
        "ss_num_batches_per_epoch": -(-len(data) // per_step),
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.learning_rate,
        "ss_optimizer": config.optimizer,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": per_step,
        "ss_gradient_accumulation_steps": config.grad_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": config.warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_loss_type": {"MSE": "l2", "SmoothL1": "smooth_l1"}.get(config.loss_function, config.loss_function.lower()),
        "ss_seed": config.seed,
        "ss_mixed_precision": "no" if dtype == "fp32" else dtype,
        "ss_cache_latents": True,
        "ss_enable_bucket": len(buckets) > 1,
        "ss_bucket_info": {
            "buckets": {
                str(number): {"resolution": list(size), "count": count}
                for number, (size, count) in enumerate(sorted(buckets.items()))
            }
        },
        "ss_dataset_dirs": {_DATASET: {"n_repeats": 1, "img_count": images}},
        "ss_tag_frequency": {_DATASET: tags} if tags else None,
    }


def _modelspec(job: Job, data: EncodedDataset, *, title: str, trigger: str) -> dict[str, object]:
    base = job.denoiser.base
    family, parameterization = base.family, job.denoiser.diffusion.parameterization
    width, height = max(_picture_sizes(base, data), key=_area)
    tags = _tags(data)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec_architecture(parameterization)}/lora",
        "modelspec.implementation": family.modelspec_implementation,
        "modelspec.title": title or "LoRA",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.trigger_phrase": trigger,
        # ModelSpec has no prediction type for flow models.
        "modelspec.prediction_type": "" if parameterization == "flow" else parameterization,
        "modelspec.tags": ", ".join(list(tags)[:20]),
    }


def _lycoris_arguments(config: ResolvedConfig) -> dict[str, object]:
    arguments = {
        "dora_wd": config.dora != "none",
        "wd_on_output": config.dora == "output",
        "rs_lora": config.rslora,
        "use_tucker": config.tucker,
    }
    size = {"factor": config.rank} if words_of(config.algorithm).rank_meaning == "factor" else {}
    return {**{name: value for name, value in arguments.items() if value}, **size}


def _picture_sizes(base: Model, data: EncodedDataset) -> list[tuple[int, int]]:
    """Width and height in pixels of each sample's picture."""
    factor = base.components.latent.downscale
    return [(sample.latents.shape[-1] * factor, sample.latents.shape[-2] * factor) for sample in data.samples]


def _tags(data: EncodedDataset) -> dict[str, int]:
    """Tags of the subject's captions, with their frequency."""
    return tag_frequency(one.conditioning.text or "" for one in data.samples if not one.is_class)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _text(value: object) -> str:
    """A value as text: numbers and booleans as Python prints them, structures as JSON."""
    if isinstance(value, (str, int, float)):
        return str(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=False)
